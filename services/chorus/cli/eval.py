"""`chorus eval`: how often strategies are right, how long they take and what they cost, on a dataset of one's own."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from chorus.cli.connecting import AsJson, Directory, Timeout, connected
from chorus.cli.options import ConfigFile
from chorus.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, console, err, note, print_json
from chorus.client import MeshClient
from chorus.core.errors import ConfigError
from chorus.eval import report
from chorus.eval.dataset import Item, read_dataset
from chorus.eval.running import Contender, Outcome, Settings, run
from chorus.eval.scoring import Scoring


def evaluate(
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="A JSONL file: prompt or question, answers.", show_default=False)
    ],
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            "-s",
            metavar="NAME[:MODEL,MODEL*SAMPLES]",
            help="What to measure; may be repeated. Others are compared with the first. [default: route, auto]",
            show_default=False,
        ),
    ] = None,
    score: Annotated[
        Scoring,
        typer.Option("--score", help="exact: the text; choice: the likeliest of the choices; judge: a model says."),
    ] = Scoring.EXACT,
    judge_model: Annotated[str, typer.Option("--judge", metavar="MODEL", help="Who judges.", show_default=False)] = "",
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="Only the first items.")] = None,
    split: Annotated[str, typer.Option("--split", help="Only items of this split.", show_default=False)] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 256,
    concurrency: Annotated[int, typer.Option("--concurrency", "-j", min=1, max=256, help="Requests at a time.")] = 4,
    html: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write a page with plots.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write each outcome as a line of JSON.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    timeout: Timeout = None,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Measure strategies on a dataset: right answers with 95% intervals, time, tokens and cost.

    A line of a dataset: {"question": "What is 2 + 2?", "answers": ["4"], "family": "sums"}

    chorus eval sums.jsonl -s route:smollm2-135m-instruct -s vote:smollm2-135m-instruct*5 --report sums.html

    Ctrl-C ends it and shows what has been measured until then.
    """
    items = [item for item in read_dataset(dataset) if not split or item.split == split][:limit]
    if not items:
        raise typer.BadParameter(f"no item of {dataset} has the split {split!r}")
    contenders = [Contender.parse(text) for text in dict.fromkeys(strategy or ("route", "auto"))]
    settings = Settings(
        scoring=score, judge_model=judge_model, max_tokens=max_tokens, concurrency=concurrency, timeout_s=timeout
    )
    for path in filter(None, (html, out)):
        if not path.parent.is_dir():
            raise ConfigError(f"there is no folder {path.parent} to write {path.name} to")
    outcomes: list[Outcome] = []

    async def measure(mesh: MeshClient) -> None:
        await _measure(mesh, items, contenders, settings, outcomes, out)

    interrupted = False
    try:
        asyncio.run(connected(measure, directory=directory, file=config, timeout_s=timeout))
    except KeyboardInterrupt:
        interrupted = True
    if outcomes:
        _show(outcomes, dataset, html, as_json=as_json, whole=len(items) * len(contenders))
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if all(outcome.error for outcome in outcomes):
        raise typer.Exit(EXIT_FAILED)


async def _measure(
    mesh: MeshClient,
    items: Sequence[Item],
    contenders: Sequence[Contender],
    settings: Settings,
    outcomes: list[Outcome],
    out: Path | None,
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(out.open("w", encoding="utf-8")) if out is not None else None
        bar = stack.enter_context(Progress(*columns, console=err(), transient=True, disable=not err().is_terminal))
        task = bar.add_task("asking", total=len(items) * len(contenders))
        failed = 0
        async with aclosing(run(mesh, items, contenders, settings)) as told:
            async for outcome in told:
                outcomes.append(outcome)
                failed += bool(outcome.error)
                bar.update(task, advance=1, description=f"asking, {failed} failed" if failed else "asking")
                if file is not None:
                    file.write(json.dumps(asdict(outcome), ensure_ascii=False) + "\n")
                    file.flush()


def _show(outcomes: Sequence[Outcome], dataset: Path, html: Path | None, *, as_json: bool, whole: int) -> None:
    rows = report.rows(outcomes)
    if as_json:
        print_json({"strategies": [asdict(row) for row in rows], "measured": len(outcomes), "wanted": whole})
    else:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for heading in report.HEADINGS:
            table.add_column(heading, justify="left" if heading == "strategy" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*report.cells(row))
        console().print(table)
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if errors:
        note(f"{len(errors)} of {len(outcomes)} failed and count as wrong; the first: {errors[0]}")
    if len(outcomes) < whole:
        note(f"broken off: {len(outcomes)} of {whole} were measured")
    if html is not None:
        notes = [f"{len(outcomes)} of {whole} requests."] if len(outcomes) < whole else []
        html.write_text(report.page(outcomes, title=f"chorus eval: {dataset.name}", notes=notes), encoding="utf-8")
        note(f"report: {html}")
