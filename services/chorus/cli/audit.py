"""`chorus audit`: who did what, and whether anybody changed what is written of it."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from chorus.cli.connecting import AsJson, Directory
from chorus.cli.lazy import group
from chorus.cli.options import ConfigFile
from chorus.cli.output import EXIT_FAILED, console, fail, handles_errors, note, print_json
from chorus.config import load_config
from chorus.core.audit.chain import Entry, Head
from chorus.core.errors import InvalidRequestError
from chorus.local.home import MeshHome
from chorus.store.audit_log import audit_files, entries, find_logs, verify_log

_EPILOG = """\
Each service keeps a log of its own; each entry holds the SHA-256 of the one before. `chorus audit verify` finds
whatever was changed, taken out, put in or moved. Who can write all of a log could write all of it anew: note the
NUMBER:SHA256 that verify prints somewhere else, and give it to --known later.
"""

Folder = Annotated[
    Path | None,
    typer.Argument(
        metavar="[FOLDER]", help="A log, or a folder of logs. Default: those of the mesh here.", show_default=False
    ),
]

app = group(
    help="Show who did what to which model, key, token and node, and check that nobody changed it.",
    epilog=_EPILOG,
)


@app.command()
@handles_errors
def verify(
    folder: Folder = None,
    known: Annotated[
        str,
        typer.Option("--known", metavar="NUMBER:SHA256", help="An entry that was noted elsewhere.", show_default=False),
    ] = "",
    directory: Directory = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Check that nothing was changed, taken out, put in or moved. Exit code 1 where something was."""
    logs = _logs(folder, directory, config)
    head = Head.parse(known) if known else None
    if head is not None and len(logs) > 1:
        raise InvalidRequestError("--known", f"is an entry of one log, and here are {len(logs)}; name its folder")
    reports = [(log, verify_log(log, known=head)) for log in logs]
    if as_json:
        print_json(
            [
                {
                    "log": str(log),
                    "whole": not report.problems,
                    "entries": report.count,
                    "files": len(audit_files(log)),
                    "head": str(report.head),
                    "problems": [str(problem) for problem in report.problems],
                }
                for log, report in reports
            ]
        )
    else:
        for log, report in reports:
            state = "[red]damaged[/red]" if report.problems else "[green]whole[/green]"
            console().print(f"{state}  {log.name}  {report.count} entries, the last one {report.head}")
            for problem in report.problems:
                console().print(f"    {problem}", markup=False)
    if any(report.problems for _, report in reports):
        raise typer.Exit(EXIT_FAILED)


@app.command()
@handles_errors
def show(
    folder: Folder = None,
    last: Annotated[int, typer.Option("--last", "-n", min=1, help="So many entries, the newest ones.")] = 50,
    by: Annotated[str, typer.Option("--by", metavar="WHO", help="A caller, or the end of its name.")] = "",
    did: Annotated[str, typer.Option("--did", metavar="WHAT", help="token, member.revoked, model, request, …")] = "",
    directory: Directory = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show who did what, the newest last. Nothing is checked here; `chorus audit verify` does that."""
    found: list[tuple[str, Entry]] = []
    for log in _logs(folder, directory, config):
        newest = deque((entry for entry in entries(log) if _is_asked(entry, by, did)), maxlen=last)
        found += ((log.name, entry) for entry in newest)
    found.sort(key=lambda pair: pair[1].deed.at)
    rows = [_row(log, entry) for log, entry in found[-last:]]
    if as_json:
        for row in rows:
            print_json(row, lines=True)
        return
    for row in rows:
        facts = " ".join(f"{name}={value}" for name, value in row["facts"].items())
        who = row["by"].partition("//")[2].partition("/")[2] or row["by"] or row["log"]
        console().print(f"{row['at'][:19]}  {who}  {row['did']}  {row['to']}  {facts}".rstrip(), markup=False)
    if not rows:
        note("nothing of that kind was noted")


def _is_asked(entry: Entry, by: str, did: str) -> bool:
    deed = entry.deed
    return deed.by.endswith(by) and (not did or deed.kind == did or deed.kind.startswith(f"{did}."))


def _row(log: str, entry: Entry) -> dict[str, Any]:
    deed = entry.deed
    return {
        "log": log,
        "number": entry.sequence,
        "at": datetime.fromtimestamp(deed.at, UTC).isoformat(timespec="milliseconds"),
        "by": deed.by,
        "did": deed.kind,
        "to": deed.target,
        "facts": dict(deed.facts),
    }


def _logs(folder: Path | None, directory: Path | None, file: Path | None) -> list[Path]:
    """The logs that are asked for: those in `folder`, or where the configuration, `chorus up` and `chorus identity`
    keep them."""
    if folder is not None:
        places = [folder]
    else:
        home, config = MeshHome.find(directory), load_config(file=file)
        places = [home.audit, home.certs / "audit", config.mesh.certs_dir / "audit"]
        if config.audit.dir is not None:
            places.insert(0, config.audit.dir)
        if config.identity.ledger is not None:
            places.append(config.identity.ledger.parent / "audit")
    logs = [log for place in dict.fromkeys(places) for log in find_logs(place)]
    if not logs:
        where = ", ".join(map(str, dict.fromkeys(places)))
        fail(f"there is no audit log in {where}", hint="`audit.dir` says where services keep theirs")
    return logs
