"""`chorus certs`: the certificates of a mesh."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chorus.cli.connecting import Directory as MeshDirectory
from chorus.cli.lazy import group
from chorus.cli.options import ConfigFile
from chorus.cli.output import EXIT_FAILED, console, handles_errors, note, print_json
from chorus.core.identity import Role
from chorus.core.identity.rotation import Phase

if TYPE_CHECKING:
    from chorus.client.identity import IdentityClient
    from chorus.core.identity import SpiffeId
    from chorus.identity.inspection import Report

_EPILOG = """\
[bold]A mesh over three machines[/bold]
  chorus certs init                                 [dim]once, on one machine[/dim]
  chorus certs issue registry registry -a 10.0.0.2  [dim]one for each service[/dim]
  chorus certs issue runner laptop -a laptop.lan
  chorus certs issue client alice                   [dim]one for each person[/dim]
  chorus certs verify                               [dim]what is wrong, if anything[/dim]

Give each machine its own folder (runner-laptop: tls.crt, tls.key, ca.crt), and nobody ca.key. `chorus up` makes what a
mesh on one machine needs by itself.
"""
_ISSUE_EPILOG = """\
[bold]Roles[/bold]
  registry, runner, coordinator  [dim]services; they serve and call[/dim]
  client                         [dim]asks the mesh[/dim]
  admin                          [dim]asks, and operates the mesh[/dim]

[bold]Examples[/bold]
  chorus certs issue runner laptop -a laptop.lan -a 10.0.0.7
  chorus certs issue client ci --days 30 --out ./ci-certs
"""

_PHASES = {
    Phase.SPREADING: "everybody is told of the one that takes over",
    Phase.OVERLAPPING: "it has taken over, and the old one is still believed",
}

app = group(
    help="Make, show and check the certificates of a mesh.",
    epilog=_EPILOG,
)

Directory = Annotated[
    Path | None,
    typer.Option(
        "--dir", "-d", metavar="DIR", help="Folder of the certificates. Default: mesh.certs_dir.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Days = Annotated[
    float | None,
    typer.Option(metavar="DAYS", min=0.01, max=36500, help="How long it lives. Default: as the policy says."),
]
Which = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME", help="Folders in DIR (`runner-laptop`), or paths of folders. Default: all.", show_default=False
    ),
]


@app.command()
@handles_errors
def init(
    directory: Directory = None,
    trust_domain: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of the mesh, the end of every identity. Default: mesh.trust_domain.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Make a new authority; every certificate of the old one is worthless then.")
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Make a certificate authority: ca.crt, which everybody may have, and ca.key, which signs.

    Do this once for a mesh, on a machine that you trust, and keep ca.key there: whoever has it can be anybody.
    """
    from chorus.identity.ca import CA_KEY, CertificateAuthority, now_utc
    from chorus.identity.policy import load_policy

    path, configured = _settings(directory, config)
    authority = CertificateAuthority.create(load_policy(), now=now_utc(), trust_domain=trust_domain or configured)
    authority.write(path, replace=force)
    note(f"made the authority of {authority.trust_domain} in {path}, until {_day(authority.not_after)}")
    note(f"[dim]{path / CA_KEY} stays on this machine. Next: chorus certs issue --help[/]")


@app.command(epilog=_ISSUE_EPILOG)
@handles_errors
def issue(
    role: Annotated[Role, typer.Argument(metavar="ROLE", help="What it is: see below.", show_default=False)],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Who it is: lower-case letters, digits, dashes.", show_default=False)
    ],
    addresses: Annotated[
        list[str] | None,
        typer.Option(
            "--address",
            "-a",
            metavar="ADDRESS",
            help="An IP address or DNS name that it is reached by; may be given again. Services have loopback anyway.",
            show_default=False,
        ),
    ] = None,
    directory: Directory = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Write the folder here instead.", show_default=False),
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(
            metavar="NODE",
            help="Id of the machine that a runner is on, as `chorus status` shows it. It can then state no other one.",
            show_default=False,
        ),
    ] = None,
    days: Days = None,
    force: Force = False,
    config: ConfigFile = None,
) -> None:
    """Issue a certificate: a folder ROLE-NAME with tls.crt, tls.key (for its owner alone) and ca.crt.

    Chorus itself pins the name NAME.ROLE.TRUST-DOMAIN, which every certificate has; the addresses are for other tools.
    """
    from chorus.core.identity import SpiffeId
    from chorus.identity.ca import CertificateAuthority, now_utc
    from chorus.identity.policy import load_policy

    path, _ = _settings(directory, config)
    authority = CertificateAuthority.load(path)
    identity = SpiffeId(authority.trust_domain, role, name)
    loopback = ("localhost", "127.0.0.1", "::1") if role.serves else ()
    leaf = authority.issue(
        identity,
        load_policy(),
        now=now_utc(),
        addresses=[*loopback, *(addresses or ())],
        lifetime=timedelta(days=days) if days is not None else None,
        node=node,
    )
    written = leaf.write(out.expanduser() if out is not None else path, replace=force)
    sys.stdout.write(f"{written}\n")
    note(f"issued {identity}, until {_day(leaf.not_after)}; it is dialled as {identity.dns_name}")


@app.command()
@handles_errors
def show(names: Which = None, directory: Directory = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show certificates: who they are, what names they have, how long they live."""
    reports, now = _inspect(names, directory, config)
    if as_json:
        print_json([_as_dict(report, now) for report in reports])
        return
    for number, report in enumerate(reports):
        if number:
            console().print()
        _print_report(report, now)


@app.command()
@handles_errors
def verify(
    names: Which = None, directory: Directory = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Check certificates: signature, dates, key, file modes, role. Says what is wrong, and what to do.

    Exit code 0: all of them work. 1: one does not. Those that expire soon are named, but still work.
    """
    reports, now = _inspect(names, directory, config)
    works = all(report.works for report in reports)
    if as_json:
        print_json({"ok": works, "certificates": [_as_dict(report, now) for report in reports]})
    else:
        for report in reports:
            _print_verdict(report, now)
    if not works:
        raise typer.Exit(EXIT_FAILED)


@app.command()
@handles_errors
def revoke(
    node: Annotated[str, typer.Argument(metavar="NODE", help="ROLE-NAME such as runner-laptop, or a SPIFFE id.")],
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="For whoever looks at it later.")] = "",
    undo: Annotated[bool, typer.Option("--undo", help="Let it in again.")] = False,
    mesh: MeshDirectory = None,
    config: ConfigFile = None,
) -> None:
    """Shut somebody out of the mesh: within seconds no service answers them, and what they had open has ended.

    It needs the identity service (`chorus up --lan`, `chorus identity`). Its name stays barred; a machine that comes
    back takes another one, or `--undo` comes first.
    """
    from chorus.cli.identity import as_admin

    async def ask(admin: IdentityClient) -> None:
        identity = _identity_of(node, admin.trust_domain)
        await (admin.restore(identity) if undo else admin.revoke(identity, why))
        note(f"{identity} {'may join again' if undo else 'is out'}")

    asyncio.run(as_admin(ask, mesh, config))


@app.command()
@handles_errors
def rotate(
    at_once: Annotated[
        bool, typer.Option("--at-once", help="Take the next step now; who is still waited for has to join again.")
    ] = False,
    only_show: Annotated[bool, typer.Option("--show", help="Say how far it is, and change nothing.")] = False,
    mesh: MeshDirectory = None,
    config: ConfigFile = None,
) -> None:
    """Have a new authority take over from the old one, while the mesh goes on.

    Everybody learns of it with their next certificate, then it signs, then the old one is forgotten: some days, mostly.
    It needs the identity service (`chorus up --lan`, `chorus identity`), which takes each step by itself once nobody is
    shut out by it. Certificates that were issued by hand are not waited for: issue them anew while both are believed.
    """
    from chorus.cli.identity import as_admin
    from chorus.wire.identity import ROTATION_PHASES

    async def ask(admin: IdentityClient) -> None:
        found = await (admin.authority() if only_show else admin.rotate_authority(at_once=at_once))
        note(f"the authority that signs is {found.sha256.hex()}")
        if not found.HasField("rotation"):
            note("no other one takes over")
            return
        phase = {value: name for name, value in ROTATION_PHASES.items()}[found.rotation.phase]
        note(f"{_PHASES[phase]}, since {_day(found.rotation.since.ToDatetime(UTC))}")
        waited = ", ".join(found.rotation.waits_for)
        note(
            f"waits for {waited}"
            if waited
            else "waits for nobody who is known, and goes on within a certificate's life"
        )

    asyncio.run(as_admin(ask, mesh, config))


def _identity_of(text: str, trust_domain: str) -> SpiffeId:
    from chorus.core.errors import InvalidRequestError
    from chorus.core.identity import SpiffeId
    from chorus.core.identity.spiffe import parse_role

    if text.startswith("spiffe://"):
        return SpiffeId.parse(text)
    role, dash, name = text.partition("-")
    if not dash:
        raise InvalidRequestError("node", f"{text[:80]!r} should be ROLE-NAME, such as runner-laptop")
    return SpiffeId(trust_domain, parse_role(role), name)


def _settings(given: Path | None, file: Path | None) -> tuple[Path, str]:
    """Returns the folder and the trust domain: as given or configured, or those of the mesh that $CHORUS_HOME names."""
    from chorus.config import load_with_origins
    from chorus.local.home import MeshHome

    loaded = load_with_origins(file=file)
    mesh, home = loaded.config.mesh, MeshHome.find()
    if given is not None:
        return given.expanduser().absolute(), mesh.trust_domain
    if home.chosen and "mesh.certs_dir" not in loaded.origins:
        return home.certs, mesh.trust_domain
    return mesh.certs_dir, mesh.trust_domain


def _inspect(names: Sequence[str] | None, given: Path | None, config: Path | None) -> tuple[list[Report], datetime]:
    from chorus.identity.ca import now_utc
    from chorus.identity.inspection import find, inspect
    from chorus.identity.policy import load_policy

    directory, _ = _settings(given, config)
    if names:
        folders = [directory / name if (directory / name).is_dir() else Path(name).expanduser() for name in names]
        paths = [path for folder in folders for path in find(folder)]
    else:
        paths = find(directory)
    now = now_utc()
    return [inspect(path, now=now, warn=load_policy().warn) for path in paths], now


def _as_dict(report: Report, now: datetime) -> dict[str, Any]:
    remaining = report.remaining(now)
    return {
        "path": str(report.path),
        "kind": "authority" if report.is_authority else "leaf",
        "identity": report.identity,
        "subject": report.subject,
        "names": report.names,
        "not_before": report.not_before.isoformat() if report.not_before else None,
        "not_after": report.not_after.isoformat() if report.not_after else None,
        "remaining_s": remaining.total_seconds() if remaining is not None else None,
        "sha256_fingerprint": report.fingerprint,
        "key_mode": report.key_mode,
        "ok": report.works,
        "problems": [
            {"severity": "error" if problem.is_error else "warning", "problem": problem.text}
            for problem in report.problems
        ],
    }


def _print_report(report: Report, now: datetime) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "certificate": str(report.path),
        "identity": report.identity or "none",
        "names": ", ".join(report.names) or "none",
        "valid": f"{_day(report.not_before)} to {_day(report.not_after)}{_left(report, now)}",
        "subject": report.subject,
        "sha-256": report.fingerprint,
        "key": f"mode {report.key_mode}" if report.key_mode else "not here",
    }
    for label, value in rows.items():
        table.add_row(label, Text(value))
    console().print(table)
    for problem in report.problems:
        _print_problem(problem.text, is_error=problem.is_error)


def _print_verdict(report: Report, now: datetime) -> None:
    from rich.text import Text

    name = "ca" if report.is_authority else report.path.parent.name
    verdict = ("ok", "green") if report.works else ("BAD", "bold red")
    line = Text.assemble((f"{verdict[0]:3}", verdict[1]), f"  {name}  ", (report.identity, "dim"), _left(report, now))
    console().print(line, soft_wrap=True)
    for problem in report.problems:
        _print_problem(problem.text, is_error=problem.is_error)


def _print_problem(text: str, *, is_error: bool) -> None:
    from rich.text import Text

    label = ("     error: ", "red") if is_error else ("     warning: ", "yellow")
    console().print(Text.assemble(label, text), soft_wrap=True)


def _day(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment is not None else "unknown"


def _left(report: Report, now: datetime) -> str:
    remaining = report.remaining(now)
    if remaining is None:
        return ""
    if remaining <= timedelta():
        return " (expired)"
    if remaining < timedelta(days=2):
        return f" ({remaining.total_seconds() / 3600:.0f} hours left)"
    return f" ({remaining.days} days left)"
