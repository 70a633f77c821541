"""`chorus status`: nodes, runners, models and load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from chorus.cli.connecting import AsJson, Directory, connected
from chorus.cli.options import ConfigFile
from chorus.cli.output import EXIT_DEGRADED, console, print_json
from chorus.client import MeshClient
from chorus.core.errors import UnavailableError
from chorus.core.fitting.suggest import describe_bytes
from chorus.core.fleet.events import LeasedRecord
from chorus.core.fleet.listing import NodeEntry
from chorus.core.fleet.records import EngineInfo, EngineKind, ModelState, ModelStatus, RunnerState
from chorus.local.home import MeshHome
from chorus.local.overview import Overview
from chorus.local.state import MeshState

_REFRESH_S = 0.25
_AGAIN_S = 1.0
_TIMEOUT_S = 10.0
_ROOMY_WIDTH = 120
_STATE_STYLES = {RunnerState.READY: "green", RunnerState.STARTING: "yellow", RunnerState.DRAINING: "yellow"}
_MODEL_STYLES = {ModelState.LOADING: "yellow", ModelState.FAILED: "red"}


def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on, live. Ctrl-C leaves.")] = False,
    as_json: AsJson = False,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Show nodes, runners, models and load, as the coordinator sees them.

    Exit codes: 0 all is well, 1 the mesh cannot be reached, 3 it works in part (what is wrong is listed).
    """
    home = MeshHome.find(directory)
    if watch:
        asyncio.run(_watch(home, directory, config, as_json))
        return

    async def look(mesh: MeshClient) -> Overview:
        return await _look(mesh, home)

    overview = asyncio.run(connected(look, directory=directory, file=config, timeout_s=_TIMEOUT_S))
    if as_json:
        print_json(_json(overview))
    else:
        console().print(_render(overview))
    if overview.problems():
        raise typer.Exit(EXIT_DEGRADED)


async def _look(mesh: MeshClient, home: MeshHome) -> Overview:
    return Overview(await mesh.list_nodes(), MeshState.read(home.state_file))


async def _watch(home: MeshHome, directory: Path | None, config: Path | None, as_json: bool) -> None:
    """Follows the directory: every event of it, a bookmark included, is a reason to look again."""
    with Live(console=console(), auto_refresh=False, screen=False, transient=False) as live:

        def show(content: RenderableType) -> None:
            live.update(content, refresh=True)

        async def follow(mesh: MeshClient) -> None:
            shown_at = 0.0
            async for _ in mesh.watch_nodes():
                await asyncio.sleep(max(0.0, shown_at + _REFRESH_S - time.monotonic()))
                shown_at = time.monotonic()
                overview = await _look(mesh, home)
                if as_json:
                    print_json(_json(overview), lines=True)
                else:
                    show(_render(overview))

        while True:
            try:
                await connected(follow, directory=directory, file=config)
            except UnavailableError as error:
                if as_json:
                    print_json({"error": error.message}, lines=True)
                else:
                    show(Text(error.message, style="red"))
            await asyncio.sleep(_AGAIN_S)


# --- for people -----------------------------------------------------------------------------------------------------


def _render(overview: Overview) -> Group:
    parts: list[RenderableType] = []
    for entry in overview.seen.nodes:
        parts += [_node_line(entry), _runners(entry), Text()]
    parts.append(_registries(overview))
    parts += [Text(f"  {line}", style="dim") for line in overview.restarts()]
    problems = overview.problems()
    parts += [Text(f"! {problem}", style="yellow") for problem in problems]
    return Group(*parts)


def _node_line(entry: NodeEntry) -> Text:
    node = entry.node
    facts = [
        f"{node.cpu.model}, {node.cpu.physical_cores} cores",
        f"{describe_bytes(node.memory_available_bytes)} of {describe_bytes(node.memory_total_bytes)} free",
    ]
    for gpu in node.gpus:
        use = f"{describe_bytes(gpu.memory_free_bytes)} of {describe_bytes(gpu.memory_total_bytes)} free"
        facts.append(f"{gpu.name} ({use})" if gpu.usable else f"{gpu.name} (unused: {gpu.problem})")
    return Text.assemble((node.hostname or node.node_id, "bold"), f"  {node.node_id}", ("  " + "  ".join(facts), "dim"))


def _runners(entry: NodeEntry) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    roomy = console().width >= _ROOMY_WIDTH
    for column in ("  runner", "state", ">lease", "model", ">busy", ">queued", ">context", ">tokens/s", "address"):
        if roomy or column != "address":
            justify: JustifyMethod = "right" if column.startswith(">") else "left"
            table.add_column(column.removeprefix(">"), justify=justify, no_wrap=column != "model")
    for leased in entry.runners:
        for row in _rows(leased):
            table.add_row(*row[: len(table.columns)])
    return table


def _rows(leased: LeasedRecord) -> Iterator[tuple[RenderableType, ...]]:
    """A row for each model of a runner; the runner itself is told in the first."""
    record = leased.record
    loads = {load.model: load for load in record.load.models}
    state = Text(record.state, style=_STATE_STYLES[record.state])
    head: tuple[RenderableType, ...] = (f"  {record.runner.runner_id}", state, f"{leased.lease_age_s:.1f} s")
    address = record.runner.address
    if not record.runner.models:
        yield (*head, Text("none", style="dim"), "", "", "", "", address)
    for model in record.runner.models:
        load = loads.get(model.artifact.name)
        yield (
            *head,
            _model(model, record.runner.engines),
            f"{load.slots_used}/{load.slots_total}" if load is not None else "",
            str(load.queued) if load is not None else "",
            str(model.context_length or ""),
            f"{load.tokens_per_second:.1f}" if load is not None and load.tokens_per_second else "",
            address,
        )
        head, address = ("", "", ""), ""


def _model(model: ModelStatus, engines: Sequence[EngineInfo]) -> Text:
    name = Text(model.artifact.name, style="dim" if model.state is ModelState.AVAILABLE else "")
    if model.state is not ModelState.LOADED:
        words = f" {model.state}: {model.error}" if model.error else f" {model.state}"
        name.append(words, style=_MODEL_STYLES.get(model.state, "dim"))
    if model.adapters:
        name.append(f" with {', '.join(model.adapters)}", style="dim")
    for engine in engines:
        if engine.name == model.engine and engine.kind is not EngineKind.LOCAL:
            name.append(f" by {engine.name}{' outside' if engine.kind is EngineKind.EXTERNAL else ''}", style="dim")
            if engine.plaintext:
                name.append(" unencrypted", style="yellow")
    return name


def _registries(overview: Overview) -> Text:
    line = Text("registries", style="dim")
    for registry in overview.seen.registries:
        if not registry.connected:
            line.append(f"  {registry.address} not connected", style="red")
        elif not registry.synced:
            line.append(f"  {registry.address} has just started", style="yellow")
        else:
            line.append(f"  {registry.address} connected", style="not dim")
    return line


# --- for programs ---------------------------------------------------------------------------------------------------


def _json(overview: Overview) -> dict[str, Any]:
    return {
        "nodes": [
            {**asdict(entry.node), "runners": [_runner_json(leased) for leased in entry.runners]}
            for entry in overview.seen.nodes
        ],
        "registries": [asdict(registry) for registry in overview.seen.registries],
        "synced": overview.seen.synced,
        "local": asdict(overview.local) if overview.local is not None else None,
        "problems": overview.problems(),
    }


def _runner_json(leased: LeasedRecord) -> dict[str, Any]:
    record = leased.record
    runner = asdict(record.runner)
    for model in runner["models"]:
        model["features"] = sorted(model["features"])
    return {
        **runner,
        "state": record.state,
        "load": asdict(record.load),
        "sequence": record.sequence,
        "lease_age_s": leased.lease_age_s,
    }
