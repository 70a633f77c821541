"""`chorus token`: the right to join, to be given to one machine each."""

from __future__ import annotations

import asyncio
import re
import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from chorus.cli.connecting import AsJson, Directory
from chorus.cli.identity import as_admin
from chorus.cli.lazy import group
from chorus.cli.options import ConfigFile
from chorus.cli.output import console, handles_errors, note, print_json
from chorus.core.errors import InvalidRequestError
from chorus.core.identity import Role

_EPILOG = """\
[bold]A machine joins[/bold]
  chorus token create --role runner   [dim]here; it prints one line[/dim]
  chorus join 10.0.0.2:7312 --token … [dim]there: that line[/dim]

A token is for one machine, once, within an hour unless --ttl says otherwise. Who has the line can join: send it as you
would a password. `chorus certs revoke` shuts out who has joined.
"""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

app = group(
    help="Let machines join: make, list and revoke join tokens.",
    epilog=_EPILOG,
)


@app.command()
@handles_errors
def create(
    role: Annotated[Role, typer.Option("--role", "-r", help="What joins: runner, client, ...")] = Role.RUNNER,
    ttl: Annotated[str, typer.Option("--ttl", metavar="TIME", help="How long it is good: 90s, 30m, 1h, 7d.")] = "1h",
    name: Annotated[
        str,
        typer.Option(
            "--name",
            metavar="NAME",
            help="Who joins, in place of whoever has that name. Default: it says so itself.",
            show_default=False,
        ),
    ] = "",
    node: Annotated[
        str,
        typer.Option(
            "--node",
            metavar="NODE",
            help="The node, as `chorus status` names it, where alone it is good, though a runner may be there already.",
            show_default=False,
        ),
    ] = "",
    directory: Directory = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a token. Prints the line that the new machine runs, and keeps no copy of its secret."""
    where, line, token = asyncio.run(
        as_admin(
            lambda admin: admin.create_token(role, name=name, node_id=node, ttl_s=seconds_of(ttl)), directory, config
        )
    )
    if as_json:
        print_json({"join": where, "token": str(line), "token_id": token.token_id})
        return
    sys.stdout.write(f"chorus join {where} --token {line}\n")
    until = datetime.fromtimestamp(token.expires_at.seconds, UTC)
    note(f"good for one {role}, until {until:%Y-%m-%d %H:%M} UTC; `chorus token revoke {token.token_id}` takes it back")


@app.command(name="list")
@handles_errors
def list_(directory: Directory = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List tokens and what became of them. Those that ended a week ago are forgotten."""
    from chorus.wire.identity import STATES

    tokens = asyncio.run(as_admin(lambda admin: admin.tokens(), directory, config))
    rows = [
        {
            "token_id": token.token_id,
            "state": STATES.get(token.state, "unknown"),
            "role": Role(_role_name(token.role)).value,
            "name": token.name,
            "expires_at": datetime.fromtimestamp(token.expires_at.seconds, UTC).isoformat(),
            "used_by": token.used_by,
        }
        for token in tokens
    ]
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table("token", "state", "role", "expires", "joined as", box=None)
    for row in rows:
        table.add_row(row["token_id"], row["state"], row["role"], row["expires_at"][:16], row["used_by"] or row["name"])
    console().print(table if rows else "no tokens; `chorus token create` makes one")


@app.command()
@handles_errors
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="TOKEN", help="As `chorus token list` shows it.")],
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Take a token back that nobody has used yet."""
    asyncio.run(as_admin(lambda admin: admin.revoke_token(token_id), directory, config))
    note(f"{token_id} is worth nothing any more")


def _role_name(value: int) -> Role:
    from chorus.wire.identity import decode_role

    return decode_role(value)


def seconds_of(text: str) -> float:
    """A time as people write it. Raises InvalidRequestError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if found is None:
        raise InvalidRequestError("--ttl", f"{text[:20]!r} is no time; write 90s, 30m, 1h or 7d")
    return float(found[1]) * _UNITS[found[2]]
