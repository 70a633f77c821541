"""How commands reach the mesh: the options they share, and a client for as long as one of them runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

import chorus.cli.quiet  # noqa: F401
from chorus.client import MeshClient
from chorus.local.connect import client_config
from chorus.local.home import MeshHome

_Result = TypeVar("_Result")

Directory = Annotated[
    Path | None,
    typer.Option(
        "--dir", metavar="FOLDER", help="Folder of the mesh on this machine. \\[env: CHORUS_HOME]", show_default=False
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout", metavar="SECONDS", min=0.1, max=86_400, help="Give up after this long.", show_default=False
    ),
]
Model = Annotated[str, typer.Option("--model", "-m", metavar="NAME", help="Which model answers.", show_default=False)]
Adapter = Annotated[
    str,
    typer.Option("--adapter", metavar="NAME", help="A LoRA adapter to answer with.", show_default=False),
]
System = Annotated[
    str, typer.Option("--system", "-s", metavar="TEXT", help="Instructions before the question.", show_default=False)
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "-n", min=1, help="Longest answer.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", min=0.0, max=5.0, help="0 always takes the likeliest token.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="The same seed draws the same tokens.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


async def connected(
    run: Callable[[MeshClient], Awaitable[_Result]],
    *,
    directory: Path | None,
    file: Path | None,
    timeout_s: float | None = None,
) -> _Result:
    """Runs `run` with a client of the mesh that is configured, or else of the one on this machine."""
    config = client_config(MeshHome.find(directory), file=file, timeout_s=timeout_s)
    async with MeshClient.from_config(config) as mesh:
        return await run(mesh)
