"""`chorus stats`: how the mesh's requests fared in the last minutes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from chorus.cli.connecting import AsJson, Directory, connected
from chorus.cli.event_lines import printable
from chorus.cli.options import ConfigFile
from chorus.cli.output import EXIT_DEGRADED, console, print_json
from chorus.client import MeshClient, MeshStats
from chorus.core.events.sketch import Sketch
from chorus.core.events.stats import Figures
from chorus.core.fleet.records import EngineKind

_TIMEOUT_S = 10.0
_SHARES = (0.5, 0.95, 0.99)


def stats(
    as_json: AsJson = False,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Show how requests fared in the last five minutes, everybody's together: the share that this mesh's own engines
    answered, latency, errors and refusals by model and by machine, answers carried over from one runner to another.

    The figures of every configured coordinator are added up. Latencies are those that 50%, 95% and 99% of the requests
    stayed under; of tokens a second, those that as many were over.

    Exit codes: 0 all coordinators answered, 1 none did, 3 some are missing (they are listed).
    """

    async def run(mesh: MeshClient) -> MeshStats:
        return await mesh.stats()

    seen = asyncio.run(connected(run, directory=directory, file=config, timeout_s=_TIMEOUT_S))
    if as_json:
        print_json(_json(seen))
    else:
        console().print(_render(seen))
    if seen.missing:
        raise typer.Exit(EXIT_DEGRADED)


# --- for people -----------------------------------------------------------------------------------------------------


def _render(seen: MeshStats) -> Group:
    report = seen.report
    total = report.total
    parts: list[RenderableType] = [_summary(seen), Text()]
    if total.requests or total.failed_attempts:
        parts += [_table("model", report.models, total), Text()]
        if report.nodes:
            parts += [_table("node", report.nodes, None), Text()]
    parts += [_reasons(title, reasons) for title, reasons in _troubles(total) if reasons]
    parts += [Text(f"! {name} is missing: {printable(why)}", style="yellow") for name, why in seen.missing.items()]
    return Group(*parts)


def _summary(seen: MeshStats) -> Text:
    total = seen.report.total
    answered = len(seen.asked) - len(seen.missing)
    whom = "1 coordinator" if answered == 1 else f"{answered} coordinators"
    line = Text.assemble(
        (f"{total.requests} requests", "bold"), f" in the last {_span(seen.report.window_s)} at {whom}"
    )
    if total.local_share is not None:
        line.append(f"; {total.local_share:.0%} of the answers by this mesh's own engines")
        others = [f"{total.engines[kind]} {kind}" for kind in (EngineKind.REMOTE, EngineKind.EXTERNAL)]
        line.append(f" ({', '.join(others)})" if total.local_share < 1 else "")
    return line


def _table(what: str, figures: Mapping[str, Figures], total: Figures | None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    columns = [what, ">done", ">gone", ">failed", ">refused", ">tries failed", ">resumed", ">tokens"]
    columns += [">queue s 50/95/99%", ">first token s 50/95/99%", ">tokens/s 50/95/99%"]
    if what == "node":
        columns.remove(">refused")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    rows = sorted(figures.items())
    if total is not None and len(rows) != 1:
        rows.append(("all", total))
    for name, one in rows:
        cells: list[Text | str] = [
            Text(printable(name), style="bold" if one is total else ""),
            str(one.completed),
            str(one.cancelled),
            _trouble(one.failed.total()),
            _trouble(one.refused.total()),
            _trouble(one.failed_attempts.total()),
            str(one.resumed),
            str(one.output_tokens),
            _quantiles(one.queue, 2),
            _quantiles(one.first_token, 2),
            _quantiles(one.tokens_per_second, 1, rates=True),
        ]
        if what == "node":
            del cells[4]
        table.add_row(*cells)
    return table


def _trouble(count: int) -> Text:
    return Text(str(count), style="red" if count else "")


def _quantiles(sketch: Sketch, digits: int, *, rates: bool = False) -> str:
    if not sketch.count:
        return "-"
    return " ".join(f"{sketch.quantile(1 - share if rates else share):.{digits}f}" for share in _SHARES)


def _troubles(total: Figures) -> list[tuple[str, Counter[str]]]:
    return [
        ("failed", total.failed),
        ("refused", total.refused),
        ("tries that failed", total.failed_attempts),
    ]


def _reasons(title: str, reasons: Counter[str]) -> Text:
    told = ", ".join(f"{count} {printable(reason)}" for reason, count in reasons.most_common())
    return Text.assemble((f"{title}: ", "dim"), told)


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


# --- for programs ---------------------------------------------------------------------------------------------------


def _json(seen: MeshStats) -> dict[str, Any]:
    report = seen.report
    return {
        "window_s": round(report.window_s, 3),
        "coordinators": list(seen.asked),
        "missing": dict(seen.missing),
        "total": _figures_json(report.total),
        "models": {name: _figures_json(one) for name, one in sorted(report.models.items())},
        "nodes": {name: _figures_json(one) for name, one in sorted(report.nodes.items())},
    }


def _figures_json(one: Figures) -> dict[str, Any]:
    return {
        "requests": one.requests,
        "completed": one.completed,
        "cancelled": one.cancelled,
        "failed": dict(one.failed),
        "refused": dict(one.refused),
        "failed_attempts": dict(one.failed_attempts),
        "resumed": one.resumed,
        "local_share": one.local_share,
        "engines": {kind.value: one.engines[kind] for kind in EngineKind},
        "prompt_tokens": one.prompt_tokens,
        "output_tokens": one.output_tokens,
        "queue_s": _sketch_json(one.queue),
        "first_token_s": _sketch_json(one.first_token),
        "tokens_per_second": _sketch_json(one.tokens_per_second, rates=True),
    }


def _sketch_json(sketch: Sketch, *, rates: bool = False) -> dict[str, float] | None:
    if not sketch.count:
        return None
    found = {f"p{share * 100:.0f}": round(sketch.quantile(1 - share if rates else share), 6) for share in _SHARES}
    return {"mean": round(sketch.mean, 6), **found}
