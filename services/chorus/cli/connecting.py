"""How commands reach the mesh: the options they share, and a client for as long as one of them runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
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
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        metavar="FILE",
        help="Show the API key (or token) in this file in place of a certificate. \\[env: CHORUS_API_KEY_FILE]",
        show_default=False,
    ),
]
Ca = Annotated[
    str | None,
    typer.Option(
        "--ca",
        metavar="FILE|SHA256",
        help="With a key: the mesh's authority, as a file (ca.crt) or by its fingerprint.",
        show_default=False,
    ),
]
CoordinatorAddress = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        metavar="\\[NAME@]HOST:PORT",
        help="Ask this coordinator; with a key, where it serves those.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


async def connected(
    run: Callable[[MeshClient], Awaitable[_Result]],
    *,
    directory: Path | None,
    file: Path | None,
    timeout_s: float | None = None,
    key: Mapping[str, object] | None = None,
) -> _Result:
    """Runs `run` with a client of the mesh that is configured, or else of the one on this machine.

    `key`: as `client_config`'s.
    """
    config = client_config(MeshHome.find(directory), file=file, timeout_s=timeout_s, key=key)
    async with MeshClient.from_config(config) as mesh:
        return await run(mesh)
