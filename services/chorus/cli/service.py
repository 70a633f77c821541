"""`chorus service`: this machine serves from every start on."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from chorus.cli.connecting import Directory
from chorus.cli.lazy import group
from chorus.cli.output import fail, handles_errors, note
from chorus.local.home import MeshHome
from chorus.local.joining import joined_already
from chorus.local.unit import install as install_unit
from chorus.local.unit import joined_unit

app = group(
    help="Have this machine serve in its mesh from every start on (systemd).",
)


@app.callback()
def _group() -> None:
    """Have this machine serve in its mesh from every start on (systemd)."""


@app.command()
@handles_errors
def install(
    user: Annotated[bool, typer.Option("--user/--system", help="For this user, or for the whole machine.")] = True,
    show: Annotated[bool, typer.Option("--print", help="Print the unit instead of writing it.")] = False,
    directory: Directory = None,
) -> None:
    """Write a systemd unit that runs `chorus join`, after `chorus join` has worked once."""
    home = MeshHome.find(directory)
    if joined_already(home) is None:
        fail("this machine has joined no mesh yet; run the line that `chorus token create` printed first")
    unit = joined_unit(home, for_user=user)
    if show:
        sys.stdout.write(unit.text)
        return
    install_unit(unit)
    sys.stdout.write(f"{unit.path}\n")
    note(f"start it now, and at every start: {unit.enable}")
