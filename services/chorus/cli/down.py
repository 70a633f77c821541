"""`chorus down`: stop the mesh on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from chorus.cli.connecting import AsJson, Directory
from chorus.cli.output import err, note, print_json
from chorus.local.home import MeshHome
from chorus.local.state import MeshState
from chorus.local.stop import StopReport, stop_mesh


def down(
    directory: Directory = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.0, help="Kill what has not ended by then.")
    ] = 90.0,
    as_json: AsJson = False,
) -> None:
    """Stop the mesh on this machine: coordinator, runners, registry. Running answers may finish first.

    Where nothing is up there is nothing to do, which is no error.
    """
    home = MeshHome.find(directory)
    if as_json:
        print_json(asdict(stop_mesh(home, timeout_s=timeout)))
        return
    with err().status("stopping") as status:

        def show(state: MeshState) -> None:
            running = [process.name for process in state.processes if process.process is not None]
            status.update(f"stopping {', '.join(running) or 'the supervisor'}")

        report = stop_mesh(home, timeout_s=timeout, on_change=show)
    for line in _lines(report, home):
        note(line)


def _lines(report: StopReport, home: MeshHome) -> list[str]:
    lines = []
    if report.stopped:
        lines.append(f"stopped {', '.join(reversed(report.stopped))}")
    if report.killed:
        lines.append(f"[yellow]killed {', '.join(report.killed)}, which did not end in time[/]")
    if report.left_over:
        lines.append(f"[yellow]ended what ran on without its supervisor: {', '.join(report.left_over)}[/]")
    if not (report.was_up or lines):
        lines.append(f"nothing is up in {home.root}")
    return lines
