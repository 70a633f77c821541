"""`chorus version`: what is installed."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Annotated

import typer

from chorus import __version__
from chorus.cli.output import print_json

_BESIDE = ("grpcio", "protobuf", "cryptography", "llama-cpp-python")


def version(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the versions of Chorus and of what it stands on."""
    found = {"chorus": __version__, "python": platform.python_version()} | {name: _version(name) for name in _BESIDE}
    if as_json:
        print_json(found)
        return
    for name, text in found.items():
        sys.stdout.write(f"{name:<17} {text or 'not installed'}\n")


def _version(distribution: str) -> str | None:
    try:
        return installed(distribution)
    except PackageNotFoundError:
        return None
