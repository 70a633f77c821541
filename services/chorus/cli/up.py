"""`chorus up`: a mesh on this machine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from chorus.cli.connecting import Directory
from chorus.cli.options import ConfigFile
from chorus.cli.output import fail, note
from chorus.cli.pull_progress import PullBar
from chorus.cli.up_view import UpView
from chorus.config import LoadedConfig, load_with_origins
from chorus.core.resilience.restarts import ProcessPhase
from chorus.core.resilience.silence import SILENT_S
from chorus.local.background import start_in_background, start_what_is_down
from chorus.local.home import MeshHome
from chorus.local.lan import choose_address
from chorus.local.launch import AlreadyUpError, Prepared, locked, prepare, supervise, supervisor_arguments
from chorus.local.plan import UpOptions


def up(
    directory: Directory = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Run in the background; return once it answers.")
    ] = False,
    runners: Annotated[int, typer.Option("--runners", "-n", metavar="N", help="How many runners.")] = 2,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="NAME", help="Model to serve, fetched if missing. Repeatable."),
    ] = None,
    supervise_: Annotated[
        bool, typer.Option("--supervise/--no-supervise", help="Start a process again when it crashed.")
    ] = True,
    lan: Annotated[bool, typer.Option("--lan", help="Serve the other machines of this household too.")] = False,
    lan_address: Annotated[
        str | None, typer.Option("--lan-address", metavar="IP", help="Which private address, if there are several.")
    ] = None,
    port_base: Annotated[
        int | None,
        typer.Option(
            "--port-base", metavar="PORT", help="Registry at PORT+1, runners from PORT+101, coordinator at PORT+201."
        ),
    ] = None,
    silent_after: Annotated[
        float,
        typer.Option(
            "--silent-after",
            metavar="SECONDS",
            help="Kill, and start again, a process that lives but has answered nothing for so long; 0 never does.",
        ),
    ] = SILENT_S,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each thing that happens.")] = False,
) -> None:
    """Start a mesh on this machine: certificates, a registry, runners and a coordinator, one process and one log each.

    It is ready when the model has answered. What crashes or hangs is started again, each time after a longer while;
    what fails three times in a row is left down, and you are told.

    Ctrl-C, or `chorus down` from elsewhere, stops it: first the coordinator, then the runners, then the registry.
    """
    home = MeshHome.find(directory)
    base = load_with_origins(file=config)
    address = choose_address(lan_address) if lan or lan_address is not None else None
    options = UpOptions(
        home=home,
        runners=runners,
        supervised=supervise_,
        lan_ip=address.ip if address is not None else None,
        models=tuple(model or ()),
        port_base=port_base,
        silent_s=silent_after,
    )
    view = UpView(home, as_json=as_json, in_foreground=not detach)
    try:
        if detach:
            _detached(options, base, config, view)
        else:
            _in_foreground(options, base, view)
    except AlreadyUpError as error:
        _already_up(home, error, view)


def _in_foreground(options: UpOptions, base: LoadedConfig, view: UpView) -> None:
    with locked(options.home):
        prepared = _prepare(options, base, view)
        view.begin([process.name for process in prepared.plan.processes])
        try:
            asyncio.run(supervise(prepared.plan, view.see))
        finally:
            view.end()
    if not view.as_json:
        note("stopped")


def _detached(options: UpOptions, base: LoadedConfig, config: Path | None, view: UpView) -> None:
    # Here is a terminal to show progress on; the supervisor finds all of it done.
    with locked(options.home):
        prepared = _prepare(options, base, view)
    view.begin([process.name for process in prepared.plan.processes])
    try:
        state = start_in_background(options.home, supervisor_arguments(options, config), on_change=view.look)
    finally:
        view.end()
    view.summarize(state)


def _prepare(options: UpOptions, base: LoadedConfig, view: UpView) -> Prepared:
    prepared = prepare(options, base, PullBar)
    if not view.as_json:
        if prepared.left_over:
            note(f"ended what an earlier supervisor had left: {', '.join(prepared.left_over)}")
        if prepared.issued:
            note(f"made {prepared.issued} certificates in {prepared.plan.certs_dir}")
    return prepared


def _already_up(home: MeshHome, error: AlreadyUpError, view: UpView) -> None:
    state = error.state
    if state is None or state.phase != "ready":
        phase = state.phase if state is not None else "starting"
        fail(f"{error.message}, and is {phase} now", hint="wait a moment, or stop it with `chorus down`")
    if not view.as_json:
        note(error.message)
    down = [process.name for process in state.processes if process.phase == ProcessPhase.DOWN]
    if down:
        if not view.as_json:
            note(f"starting again what was left down: {', '.join(down)}")
        state = start_what_is_down(home, state)
    view.summarize(state, already=True)
