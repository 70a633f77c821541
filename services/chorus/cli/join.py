"""`chorus join`: this machine becomes part of a mesh."""

from __future__ import annotations

from typing import Annotated

import typer

from chorus.cli.connecting import Directory
from chorus.cli.output import fail, note
from chorus.config import Endpoint, load_config
from chorus.core.errors import ConfigError
from chorus.core.identity import Role
from chorus.core.identity.join_line import JoinLine
from chorus.local.doctor.machine import find_ollama
from chorus.local.home import MeshHome
from chorus.local.joining import Joined, Wish, joined_already
from chorus.local.joining import join as join_mesh
from chorus.local.launch import host_label, machine_id

_OLLAMA = "ollama=http://127.0.0.1:11434"


def join(
    where: Annotated[
        str | None, typer.Argument(metavar="HOST:PORT", help="As `chorus token create` prints it.", show_default=False)
    ] = None,
    token: Annotated[
        str | None,
        typer.Option("--token", "-t", metavar="TOKEN", envvar="CHORUS_JOIN_TOKEN", help="From `chorus token create`."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What this machine is called. Default: its host name.")
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            "--advertise",
            metavar="HOST:PORT",
            help="Where others reach this machine. Default: the address by which it reaches the mesh.",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="ENGINE",
            help="auto (an Ollama that runs here, else llama.cpp), llama, or a server as KIND=URL.",
        ),
    ] = "auto",
    directory: Directory = None,
    only: Annotated[bool, typer.Option("--no-run", help="Join, and leave it to others to run it.")] = False,
) -> None:
    """Join a mesh with one line, and serve in it until Ctrl-C.

    The token says which mesh that is: nothing is sent to anybody else. This machine makes a key, which stays here, and
    gets a certificate for a day, which it renews by itself. Run it again, without a token, to serve again; `chorus
    service install` does so at every start of the machine.
    """
    home = MeshHome.find(directory)
    joined = joined_already(home)
    if joined is not None and token is not None:
        note(f"this machine has joined already, as {joined.identity}; its files are replaced")
    if token is not None:
        if where is None:
            fail("say where: chorus join HOST:PORT --token …")
        joined = join_mesh(home, _endpoint(where), JoinLine.parse(token), _wish(name, advertise, engine))
        note(f"joined as {joined.identity}; its configuration is {joined.config_file}")
    if joined is None:
        fail("this machine has joined no mesh; `chorus token create` on one that has prints the line to run here")
    if not only:
        _run(joined)


def _wish(name: str | None, advertise: str | None, engine: str) -> Wish:
    remote = None if engine in ("auto", "llama", "fake") else engine
    if engine == "auto" and (version := find_ollama()) is not None:
        remote = _OLLAMA
        note(f"Ollama {version} runs here and will answer; --engine llama uses llama.cpp instead")
    return Wish(
        name=name if name is not None else host_label(),
        node=machine_id(load_config().runner),
        advertise=_endpoint(advertise) if advertise is not None else None,
        remote=remote,
        engine=engine if engine == "fake" else None,
    )


def _endpoint(text: str) -> Endpoint:
    try:
        return Endpoint.parse(text)
    except ValueError as error:
        raise ConfigError(f"{text[:80]!r} {error}") from None


def _run(joined: Joined) -> None:
    from chorus.cli import services

    run = {
        Role.RUNNER: services.run_runner,
        Role.COORDINATOR: services.run_coordinator,
        Role.REGISTRY: services.run_registry,
    }.get(joined.identity.role)
    if run is not None:
        run(load_config(file=joined.config_file))
    note(f"ask the mesh with: chorus ask --config {joined.config_file} …")
