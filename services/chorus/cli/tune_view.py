"""What `chorus tune` shows: the table of what was measured, what it means, and how far it is."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from chorus.cli.output import console, err, note

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from chorus.core.tuning.proposal import Option, Proposal
    from chorus.core.tuning.search import Findings
    from chorus.core.tuning.variant import Variant
    from chorus.local.tuning import Kept, Now, TuneOptions


def table(findings: Findings, proposal: Proposal, quantization: str, streams: int) -> Table:
    """A row for everything that was measured."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    numbers = (
        "Threads",
        "Batch",
        "Prompt t/s",
        "1 stream",
        f"{streams} streams",
        "Spread",
        "Speed",
        "Memory",
        "Perplexity",
    )
    for name in ("File", "KV", *numbers, ""):
        shown.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    for variant, record in findings.records.items():
        if not record.samples and not record.problem:
            continue
        best = variant == proposal.free.variant
        cells = [
            variant.quantization or quantization,
            variant.cache_type,
            str(variant.threads),
            f"{variant.batch_tokens}/{variant.micro_batch_tokens}",
        ]
        if record.samples:
            gain = findings.gain(variant)
            cells += [f"{record.figure(name).median:.1f}" for name in ("prefill", "decode_one", "decode_many")]
            cells += [f"±{record.speed.spread:.0%}", f"{gain:.2f}x", f"{record.memory_bytes / 2**20:.0f} MiB"]
        else:
            cells += [""] * 6
        cells += [_perplexity(findings, variant), _verdict(findings, proposal, variant)]
        shown.add_row(*cells, style="bold green" if best else "red" if record.problem else "")
    return shown


def _perplexity(findings: Findings, variant: Variant) -> str:
    record, loss = findings.record(variant), findings.loss(variant)
    if record.quality is None:
        return ""
    change = "" if variant == findings.base or loss is None else f" {loss.change:+.1%}"
    return f"{record.quality.perplexity:.2f}{change}"


def _verdict(findings: Findings, proposal: Proposal, variant: Variant) -> str:
    record = findings.record(variant)
    if record.problem:
        return f"failed: {record.problem[:80]}"
    if variant == proposal.free.variant:
        return "proposed" if proposal.changes else "best, as it is"
    if variant == findings.base:
        return "as it is"
    if any(variant == option.variant for option in proposal.costly):
        return "faster, but loses"
    return "not better" if record.gain is not None else "no time left"


def explain(findings: Findings, proposal: Proposal, options: TuneOptions) -> None:
    """Prints what is proposed and why, what could be had for a loss, and what there was no time for."""
    for reason in proposal.reasons:
        console().print(reason, markup=False)
    for option in proposal.costly:
        margin = f" (±{2 * option.error:.1%})" if option.error else ""
        console().print(
            f"For a loss: {in_words(option)} runs at {option.gain:.2f}x with a perplexity {option.loss:+.1%}{margin}; "
            "--accept-loss PERCENT takes it.",
            markup=False,
        )
    if findings.skipped:
        longer = 2 * options.effort.budget_s / 60
        note(f"There was no time for {len(findings.skipped)} more; --minutes {longer:g} gives more.")


def in_words(option: Option) -> str:
    """A variant in a few words."""
    from chorus.local.tuning import describe

    return describe(option.variant)


def to_json(findings: Findings, proposal: Proposal, chosen: Option, kept: Kept | None) -> dict[str, Any]:
    """All of it, for programs."""
    records = []
    for variant, record in findings.records.items():
        loss = findings.loss(variant)
        records.append(
            {
                "variant": asdict(variant),
                "samples": [asdict(sample) for sample in record.samples],
                "gain": findings.gain(variant),
                "memory_bytes": record.memory_bytes,
                "perplexity": record.quality.perplexity if record.quality else None,
                "loss": asdict(loss) if loss is not None else None,
                "problem": record.problem,
                "verdict": _verdict(findings, proposal, variant),
            }
        )
    return {
        "base": asdict(findings.base),
        "measured": records,
        "skipped": [asdict(variant) for variant in findings.skipped],
        "proposed": asdict(proposal.free),
        "changes": proposal.changes,
        "reasons": proposal.reasons,
        "costly": [asdict(option) for option in proposal.costly],
        "chosen": asdict(chosen),
        "kept": None
        if kept is None
        else {
            "path": str(kept.path),
            "tuning": kept.tuning.model_dump(mode="json"),
            "artifact": None if kept.artifact is None else kept.artifact.artifact.name,
        },
    }


class TuneProgress:
    """One bar on a terminal, which fills as the time is spent; in a pipe a line for each thing that is done."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._said = ""

    def __enter__(self) -> TuneProgress:
        if err().is_terminal:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=err(),
                transient=True,
            )
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the bar away. May be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def tell(self, now: Now) -> None:
        """Shows what is being done."""
        if self._bar is not None and self._task is not None:
            done = min(now.elapsed_s, now.budget_s)
            self._bar.update(self._task, description=now.words, completed=done, total=now.budget_s)
        elif now.words != self._said:
            self._said = now.words
            err().print(now.words, markup=False, soft_wrap=True)
