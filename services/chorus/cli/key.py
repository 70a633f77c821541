"""`chorus key`: API keys for people and programs that have no certificate."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from chorus.cli.connecting import AsJson, Directory
from chorus.cli.lazy import group
from chorus.cli.options import ConfigFile
from chorus.cli.output import console, handles_errors, note, print_json
from chorus.cli.token import seconds_of
from chorus.core.identity import Role

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from chorus.client.keys import KnownKey, MeshKeys

_Result = TypeVar("_Result")

_EPILOG = """\
[bold]A person without a certificate asks[/bold]
  chorus key create ann --requests-per-minute 60 --out ann.key   [dim]here, as an admin[/dim]
  chorus ask --coordinator HOST:PORT --api-key-file ann.key --ca SHA256 "Hello"   [dim]there[/dim]

Coordinators serve holders of keys where callers.listen says; without it there are none. Scopes and limits can't be
changed later: make another key, and revoke this one.
"""

app = group(help="Let people and programs in without a certificate: make, list and revoke API keys.", epilog=_EPILOG)


@app.command()
@handles_errors
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it: whose it is, what it is for.")],
    ttl: Annotated[
        str | None, typer.Option("--ttl", metavar="TIME", help="How long it is good: 12h, 30d. Default: until revoked.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="PATTERN", help="A model it may ask, as qwen3-*; repeat."),
    ] = None,
    strategy: Annotated[list[str] | None, typer.Option("--strategy", help="A strategy it may ask for; repeat.")] = None,
    priority: Annotated[
        list[str] | None, typer.Option("--priority", help="A class it may use: interactive, batch, background; repeat.")
    ] = None,
    requests_per_minute: Annotated[int, typer.Option("--requests-per-minute", min=0, help="0 is no limit.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option("--tokens-per-minute", min=0, help="Of prompts and answers.")] = 0,
    tokens_per_day: Annotated[int, typer.Option("--tokens-per-day", min=0, help="In any 24 hours.")] = 0,
    concurrent: Annotated[int, typer.Option("--concurrent", min=0, help="Requests under way at once.")] = 0,
    budget: Annotated[int, typer.Option("--budget", min=0, help="Tokens in all; then it is used up.")] = 0,
    client: Annotated[
        str,
        typer.Option(
            "--client",
            metavar="NAME",
            help="A client with a certificate of that name: under the same scopes and limits, direct mode included.",
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the key there (mode 0600), not here.")
    ] = None,
    directory: Directory = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. Prints it once, and keeps no copy of it."""
    from chorus.core.callers import Limits
    from chorus.core.callers.grants import scopes_of
    from chorus.transport.files import KEY_MODE, write_new

    scopes = scopes_of(model or (), strategy or (), priority or ())
    limits = Limits(requests_per_minute, tokens_per_minute, tokens_per_day, concurrent, budget)
    ttl_s = seconds_of(ttl) if ttl is not None else None

    async def run(keys: MeshKeys) -> tuple[KnownKey, str]:
        return await keys.create(name, ttl_s=ttl_s, client=client, scopes=scopes, limits=limits)

    if out is not None and out.exists():
        raise typer.BadParameter(f"{out} exists already", param_hint="--out")
    (key, text), fingerprint = _asked(run, directory, config)
    if out is not None:
        write_new(out, f"{text}\n".encode(), KEY_MODE, replace=False)
    if as_json:
        shown = {"key_id": key.key_id, "authority_sha256": fingerprint}
        print_json(shown if out is not None else {**shown, "key": text})
        return
    if out is None:
        sys.stdout.write(f"{text}\n")
    until = "until it is revoked" if key.expires_at is None else f"until {_moment(key.expires_at)} UTC"
    note(f"{key.key_id} is good {until}; `chorus key revoke {key.key_id}` takes it back")
    note(f"the mesh's authority, for --ca: {fingerprint}")


@app.command(name="list")
@handles_errors
def list_(directory: Directory = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List keys, and what they may do."""

    async def run(keys: MeshKeys) -> list[KnownKey]:
        return await keys.list()

    found, _ = _asked(run, directory, config)
    if as_json:
        print_json([_row(key) for key in found])
        return
    from rich.table import Table

    table = Table("key", "name", "state", "made", "expires", "client", "may ask", "limits", box=None)
    for key in found:
        expires = _moment(key.expires_at) if key.expires_at is not None else "never"
        made = _moment(key.created_at)
        table.add_row(key.key_id, key.name, key.state, made, expires, key.client, _scopes(key), _limits(key))
    console().print(table if found else "no keys; `chorus key create` makes one")


@app.command()
@handles_errors
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="As `chorus key list` shows it.")],
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Take a key back: at every coordinator within 5 seconds, calls under way included.

    A client with a certificate that shares its limits is under none then: `chorus certs revoke` shuts it out.
    """

    async def run(keys: MeshKeys) -> None:
        await keys.revoke(key_id)

    _asked(run, directory, config)
    note(f"{key_id} is worth nothing any more")


@app.command()
@handles_errors
def usage(
    key_id: Annotated[
        str, typer.Argument(metavar="KEY", help="As `chorus key list` shows it; or oidc-…, as the audit log does.")
    ],
    directory: Directory = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what was used with a key, at all coordinators that share a store. What is reserved counts."""

    async def run(keys: MeshKeys) -> dict[str, int]:
        return asdict(await keys.usage(key_id))

    used, _ = _asked(run, directory, config)
    if as_json:
        print_json(used)
        return
    from rich.table import Table

    table = Table("used", "", box=None)
    for name, count in used.items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    console().print(table)


def _asked(
    run: Callable[[MeshKeys], Awaitable[_Result]], directory: Path | None, file: Path | None
) -> tuple[_Result, str]:
    """Asks as an admin; the answer, and the fingerprint of the mesh's authority."""
    import chorus.cli.quiet  # noqa: F401
    from chorus.client import MeshClient
    from chorus.local.certificates import CLIENT_NAME
    from chorus.local.connect import client_config
    from chorus.local.home import MeshHome
    from chorus.transport.tls import CA_FILE, fingerprint_of, read_file

    config = client_config(MeshHome.find(directory), file=file, timeout_s=10.0)
    admin = f"{Role.ADMIN}-{CLIENT_NAME}"
    folder = admin if (config.mesh.certs_dir / admin).is_dir() else config.client.identity
    own = config.client.model_copy(update={"identity": folder, "api_key_file": None})

    async def ask() -> _Result:
        async with MeshClient.from_config(config.model_copy(update={"client": own})) as mesh:
            return await run(mesh.keys)

    answer = asyncio.run(ask())
    return answer, fingerprint_of(read_file(config.mesh.certs_dir / folder / CA_FILE))


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


def _scopes(key: KnownKey) -> str:
    words = [*key.scopes.models, *sorted(key.scopes.strategies), *sorted(key.scopes.priorities)]
    return ", ".join(words) or "everything"


def _limits(key: KnownKey) -> str:
    words = [f"{count:,} {name.replace('_', ' ')}" for name, count in asdict(key.limits).items() if count]
    return ", ".join(words) or "none"


def _row(key: KnownKey) -> dict[str, object]:
    return {
        "key_id": key.key_id,
        "name": key.name,
        "state": key.state,
        "created_at": key.created_at,
        "created_by": key.created_by,
        "expires_at": key.expires_at,
        "client": key.client,
        "models": list(key.scopes.models),
        "strategies": sorted(key.scopes.strategies),
        "priorities": sorted(key.scopes.priorities),
        "limits": asdict(key.limits),
    }
