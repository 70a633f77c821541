"""`chorus tune`: how a model runs best on this machine, measured; and what of that is kept."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chorus.cli.options import ConfigFile
from chorus.cli.output import EXIT_USAGE, console, fail, handles_errors, note, print_json
from chorus.cli.tune_view import TuneProgress, explain, in_words, table, to_json

if TYPE_CHECKING:
    from chorus.core.tuning.proposal import Option, Proposal
    from chorus.core.tuning.search import Findings
    from chorus.local.tuning import Kept, TuneOptions, Tuner
    from chorus.models.tuning import TuningFolder

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

_EXAMPLES = """\
[bold]Examples[/bold]
  chorus tune smollm2-135m-instruct   [dim]measure for about five minutes, then ask[/dim]
  chorus tune MODEL --quick --yes     [dim]a minute; keep what loses nothing[/dim]
  chorus tune MODEL --accept-loss 20  [dim]20% worse perplexity is fine for speed[/dim]
  chorus tune MODEL --only threads    [dim]nothing but the thread count[/dim]
  chorus tune --show                  [dim]what is kept; --forget MODEL removes it[/dim]

[bold]What it does[/bold]
  Each candidate is measured in turns with the best so far.
  Perplexity is how much a text surprises the model: the lower, the better.
  Up to 1% of it counts as nothing; more is taken only if you say so.
  A requantized file becomes a model like any other (`chorus models list`),
  and runners that are asked for the family load it from their next start.
  A busy machine gives rough figures: stop other work first (`chorus down`).
"""


class Property(StrEnum):
    """What `--only` chooses from."""

    THREADS = "threads"
    BATCH = "batch"
    CACHE = "cache"
    QUANTIZATION = "quantization"


@app.command(epilog=_EXAMPLES)
@handles_errors
def tune(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's family, artifact or file name.", show_default=False)
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="About a minute, and rougher figures.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.05, max=24 * 60, help="Begin nothing after that long. Default: 5.", show_default=False),
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Requests at a time. Default: runner.slots.", show_default=False),
    ] = None,
    only: Annotated[
        list[Property] | None, typer.Option("--only", help="Try nothing but this; may be repeated.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Keep what loses nothing, without asking.")] = False,
    accept_loss: Annotated[
        float,
        typer.Option(
            "--accept-loss",
            metavar="PERCENT",
            min=0.0,
            max=1000.0,
            help="Perplexity may be that much worse where it runs faster.",
        ),
    ] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and propose, but keep nothing.")] = False,
    show: Annotated[bool, typer.Option("--show", help="List what is kept, of all models or one.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Remove what is kept of a model.")] = False,
    models_dir: Annotated[
        Path | None,
        typer.Option(
            "--models-dir", metavar="DIR", help="Folder of models. Default: runner.models_dir.", show_default=False
        ),
    ] = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; ask nothing.")] = False,
) -> None:
    """Measure how a model runs best on this machine: threads, batches, KV memory, requantizations.

    Shows speed, memory and perplexity of each, and proposes what loses nothing. Runners go by what is kept.
    """
    from chorus.models.tuning import TuningFolder

    if show and forget:
        fail("--show and --forget contradict each other", code=EXIT_USAGE)
    if show:
        _show(TuningFolder(), model, as_json)
        return
    if not model:
        fail(
            "which model?",
            hint="`chorus models list` shows those that are here; --show what was tuned",
            code=EXIT_USAGE,
        )
    if forget:
        _forget(TuningFolder(), model, as_json)
        return

    from chorus.config import load_config
    from chorus.local.tuning import Tuner
    from chorus.models import ModelStore

    settings = load_config(file=config).runner
    store = ModelStore.open(models_dir or settings.models_dir)
    stored = store.find(model)
    options = _options(quick, minutes, streams or settings.slots, only)
    asks = not (yes or dry_run or as_json) and _somebody_is_there()
    if not (asks or yes or dry_run):
        note("Nobody is there to be asked, so nothing will be kept; --yes keeps what loses nothing.")
    _warn_if_busy()
    with (
        _interruptible(),
        TuneProgress() as progress,
        Tuner(store, stored, settings, options, tell=progress.tell) as tuner,
    ):
        findings, _, proposal = tuner.run()
        progress.stop()
        if not as_json:
            console().print(table(findings, proposal, stored.artifact.quantization, options.streams))
            explain(findings, proposal, options)
        chosen = _consented(proposal, accept_loss / 100, asks)
        kept: Kept | None = None
        worth = _is_worth_keeping(chosen, findings, tuner, TuningFolder())
        if worth and not dry_run and (yes or (asks and _agreed(f"Keep {in_words(chosen)}?", default=True))):
            kept = tuner.keep(chosen, findings)
        if as_json:
            print_json(to_json(findings, proposal, chosen, kept))
        else:
            _tell_kept(kept)


def _options(quick: bool, minutes: float | None, streams: int, only: list[Property] | None) -> TuneOptions:
    from chorus.core.tuning.search import Axis
    from chorus.local.tuning import QUICK, THOROUGH

    options = replace(QUICK if quick else THOROUGH, streams=streams)
    if minutes is not None:
        options = replace(options, effort=replace(options.effort, budget_s=60 * minutes))
    if only:
        options = replace(options, axes=frozenset(Axis(chosen.value) for chosen in only))
    return options


def _consented(proposal: Proposal, accepted_loss: float, asks: bool) -> Option:
    """What is to be kept: what loses nothing, or more where somebody agrees to the loss."""
    if accepted_loss > 0:
        return proposal.with_consent(accepted_loss)
    if asks:
        for option in proposal.costly[:2]:
            what = f"{in_words(option)} runs at {option.gain:.2f}x for a perplexity {option.loss:+.1%}."
            if _agreed(f"{what} Accept that loss?", default=False):
                return option
    return proposal.free


def _somebody_is_there() -> bool:
    return sys.stdin.isatty()


def _agreed(question: str, *, default: bool) -> bool:
    return typer.confirm(question, default=default, err=True)


def _is_worth_keeping(chosen: Option, findings: Findings, tuner: Tuner, folder: TuningFolder) -> bool:
    """Whether it says anything: that a model runs best untuned does only where something else was kept before."""
    known = any(tuning.sha256 == tuner.stored.artifact.sha256 for tuning in folder.all())
    return known or chosen.variant != findings.base


def _tell_kept(kept: Kept | None) -> None:
    if kept is None:
        note("Nothing was kept.")
        return
    if kept.artifact is not None:
        console().print(f"{kept.artifact.artifact.name}  {kept.artifact.path}", markup=False, soft_wrap=True)
    note(f"Kept in {kept.path}; runners go by it from their next start. `chorus tune --show` lists it.")


# --- what is kept ---------------------------------------------------------------------------------------------------


def _show(folder: TuningFolder, model: str, as_json: bool) -> None:
    tunings = [tuning for tuning in folder.all() if not model or _means(tuning, model)]
    if as_json:
        print_json({"folder": str(folder.directory), "tunings": [tuning.model_dump(mode="json") for tuning in tunings]})
        return
    if not tunings:
        note("Nothing is tuned yet. `chorus tune MODEL` measures what runs best here.")
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    kept = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("Model", "Threads", "Batch", "KV", "Speed", "Perplexity", "Instead", "Machine", "llama.cpp", "Tuned"):
        kept.add_column(name, justify="right" if name in ("Threads", "Batch", "Speed", "Perplexity") else "left")
    for tuning in tunings:
        kept.add_row(
            tuning.model,
            str(tuning.threads),
            f"{tuning.batch_tokens}/{tuning.micro_batch_tokens}",
            tuning.cache_type,
            f"{tuning.gain:.2f}x",
            f"{tuning.perplexity_change:+.1%}",
            f"{tuning.instead[:12]}" if tuning.instead else "",
            tuning.cpu,
            tuning.llama_build,
            tuning.tuned_at[:10],
        )
    console().print(kept)


def _forget(folder: TuningFolder, model: str, as_json: bool) -> None:
    tunings = [tuning for tuning in folder.all() if _means(tuning, model)]
    if not tunings:
        fail(f"nothing is tuned of {model[:100]!r}", hint="`chorus tune --show` lists what is")
    for tuning in tunings:
        folder.forget(tuning)
    if as_json:
        print_json({"forgotten": [tuning.model for tuning in tunings]})
        return
    for tuning in tunings:
        console().print(f"forgot {tuning.model}", markup=False)
    note("Files that were made stay; `chorus models rm NAME` removes them.")


def _means(tuning: Any, model: str) -> bool:
    wanted = model.strip().lower().removesuffix(".gguf")
    return wanted in (tuning.model.lower(), tuning.family.lower(), tuning.sha256)


# --- while it runs --------------------------------------------------------------------------------------------------


def _warn_if_busy() -> None:
    from chorus.local.tuning import busy_share

    busy = busy_share()
    if busy > 0.25:
        note(
            f"[yellow]This machine is busy ({busy:.0%} of its processor): figures will be rough.[/yellow] "
            "End what runs (`chorus down`) for better ones."
        )


@contextmanager
def _interruptible() -> Iterator[None]:
    """A polite request to end (SIGTERM) cleans up as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
