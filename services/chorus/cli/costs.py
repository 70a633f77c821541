"""`chorus costs`: what requests cost, what they avoided, how the budget stands."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import chorus.cli.quiet  # noqa: F401
from chorus.cli.connecting import AsJson, Directory
from chorus.cli.options import ConfigFile
from chorus.cli.output import EXIT_DEGRADED, console, note, print_json
from chorus.client import MeshClient, MeshCosts
from chorus.core.costs.purse import usd
from chorus.core.costs.records import Entry, Grouping, Line
from chorus.core.identity import Role
from chorus.local.certificates import CLIENT_NAME
from chorus.local.connect import client_config
from chorus.local.home import MeshHome

if TYPE_CHECKING:
    from rich.table import Table

_TIMEOUT_S = 10.0


def costs(
    by: Annotated[Grouping, typer.Option("--by", help="What the lines are by.")] = Grouping.DAY,
    days: Annotated[
        int | None,
        typer.Option("--days", metavar="N", min=0, max=36_500, help="Today and so many days before; else this month."),
    ] = None,
    latest: Annotated[
        int, typer.Option("--latest", metavar="N", min=0, max=1000, help="List so many of the latest requests, too.")
    ] = 0,
    as_json: AsJson = False,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Show what requests cost at paid providers, what they would have cost elsewhere, and how the budget stands.

    Everybody's requests with an admin's certificate, else your own.

    A paid provider is a server with OpenAI's API at a public address, to which
    a runner speaks (runner.remote, runner.remote_api_key_file). It is the last
    resort: asked by its model's name or where a request allows it (`chorus ask
    --external`), and never for private prompts. Coordinators are told what it
    charges, in millionths of a USD for a million tokens of prompt/answer, and
    may cost; beyond its budget it is not asked:

    \b
      \\[costs]
      file = "costs.db"
      prices = { "gpt-4o-mini" = "150000/600000" }
      daily_budget_usd = 1.0
      monthly_budget_usd = 5.0
      baseline_usd = 0.15

    With baseline_usd, a request that was answered without a provider has
    avoided so much. Coordinators of one machine may share the file, and with
    it the budget. Days are those of UTC. Embeddings and rankings are no
    requests here, but in what was spent; so is what a coordinator had
    reserved for requests under way when it was killed.

    Exit codes: 0 all coordinators answered, 1 none did, 3 some are missing.
    """
    seen = asyncio.run(_ask(by, days, latest, directory, config))
    if as_json:
        print_json(_json(seen))
    else:
        _show(seen)
    if seen.missing:
        raise typer.Exit(EXIT_DEGRADED)


async def _ask(by: Grouping, days: int | None, latest: int, directory: Path | None, file: Path | None) -> MeshCosts:
    config = client_config(MeshHome.find(directory), file=file, timeout_s=_TIMEOUT_S)
    admin = f"{Role.ADMIN}-{CLIENT_NAME}"
    if not config.mesh.insecure_loopback and (config.mesh.certs_dir / admin).is_dir():
        config = config.model_copy(update={"client": config.client.model_copy(update={"identity": admin})})
    async with MeshClient.from_config(config) as mesh:
        return await mesh.costs(by=by, days=days, latest=latest)


# --- for people -----------------------------------------------------------------------------------------------------


def _show(seen: MeshCosts) -> None:
    out = console()
    if seen.lines:
        out.print(_table(seen))
    else:
        out.print("no request has ended in that time")
    if seen.latest:
        out.print()
        out.print(_latest(seen.latest))
    for budget in seen.budgets:
        left = max(0, budget.limit - budget.spent - budget.reserved)
        under_way = f", {usd(budget.reserved)} kept for requests under way" if budget.reserved else ""
        out.print(
            f"this {budget.period}'s budget: {usd(budget.spent)} of {usd(budget.limit)} spent{under_way}, "
            f"{usd(left)} left ({', '.join(budget.coordinators)})",
            style="bold yellow" if not left else "",
            soft_wrap=True,
        )
    if seen.baseline is None:
        note("what was avoided is not reckoned: costs.baseline_usd says what a request would cost elsewhere")
    else:
        note(f"avoided: at {usd(seen.baseline)} for each answered request that no paid provider had a part in")
    if seen.unpriced:
        note(f"no price is known of {', '.join(seen.unpriced)}, which seem to cost nothing (costs.prices)")
    for name, why in seen.missing.items():
        note(f"{name}: {why}")


def _table(seen: MeshCosts) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(seen.grouping.value)
    for title in ("requests", "kept local", "paid", "cached", "tokens in", "out", "spent", "avoided"):
        table.add_column(title, justify="right")
    for line in seen.lines:
        table.add_row(*_row(line, line.name or "(several models)", seen.baseline is not None))
    if len(seen.lines) > 1:
        table.add_row(*_row(seen.total, "together", seen.baseline is not None), style="bold")
    return table


def _row(line: Line, name: str, reckoned: bool) -> tuple[str, ...]:
    share = line.kept_local
    return (
        name.rpartition("/")[2] if name.startswith("spiffe://") else name,
        f"{line.requests:,}",
        "" if share is None else f"{share:.1%}",
        f"{line.external:,}",
        f"{line.cached:,}",
        f"{line.prompt_tokens:,}",
        f"{line.output_tokens:,}",
        usd(line.spent),
        usd(line.avoided) if reckoned else "",
    )


def _latest(entries: tuple[Entry, ...]) -> Table:
    from rich.table import Table

    table = Table("ended (UTC)", "request", "caller", "model", "by", box=None, pad_edge=False)
    for title in ("tokens in", "out", "spent"):
        table.add_column(title, justify="right")
    for entry in entries:
        table.add_row(
            f"{datetime.fromtimestamp(entry.at, UTC):%Y-%m-%d %H:%M:%S}",
            entry.request_id,
            entry.caller.rpartition("/")[2],
            entry.model or "(several models)",
            entry.where.value if entry.completed else f"{entry.where.value}, not whole",
            f"{entry.prompt_tokens:,}",
            f"{entry.output_tokens:,}",
            usd(entry.spent),
        )
    return table


# --- for programs ---------------------------------------------------------------------------------------------------


def _json(seen: MeshCosts) -> dict[str, Any]:
    return {
        "by": seen.grouping,
        "lines": [_line(line) for line in seen.lines],
        "total": _line(seen.total),
        "budgets": [
            {
                "coordinators": budget.coordinators,
                "period": budget.period,
                "limit_micro_usd": budget.limit,
                "spent_micro_usd": budget.spent,
                "reserved_micro_usd": budget.reserved,
                "begins_anew_in_s": budget.anew_in_s,
            }
            for budget in seen.budgets
        ],
        "baseline_micro_usd": seen.baseline,
        "unpriced_models": seen.unpriced,
        "latest": [asdict(entry) for entry in seen.latest],
        "missing": seen.missing,
    }


def _line(line: Line) -> dict[str, Any]:
    return {
        "name": line.name,
        "requests": line.requests,
        "local": line.local,
        "external": line.external,
        "cached": line.cached,
        "kept_local": line.kept_local,
        "prompt_tokens": line.prompt_tokens,
        "output_tokens": line.output_tokens,
        "spent_micro_usd": line.spent,
        "avoided_micro_usd": line.avoided,
    }
