"""`chorus events`: what happens in the mesh, live."""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing
from typing import Annotated, Any

import typer
from rich.text import Text

from chorus.cli.connecting import Directory, connected
from chorus.cli.event_lines import event_line
from chorus.cli.options import ConfigFile
from chorus.cli.output import console, note, print_json
from chorus.client import CoordinatorLost, CoordinatorWatched, EventNews, EventsMissing, MeshClient, SeenEvent
from chorus.core.events import EventFilter, EventKind, LostReason
from chorus.wire.mesh_events import event_json

_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|)")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_LOST_TEXTS = {
    LostReason.LAGGED: "are not kept any more",
    LostReason.OTHER_EPOCH: "may be missing: the coordinator was restarted",
}


def _kinds(given: list[str]) -> frozenset[EventKind]:
    """The kinds that names or their beginnings stand for: `breaker` is all three of them."""
    found: set[EventKind] = set()
    for text in given:
        name = text.strip().lower().replace("-", "_")
        matching = {kind for kind in EventKind if name in (kind.value, kind.value.partition("_")[0])}
        if not matching:
            known = ", ".join(kind.replace("_", "-") for kind in EventKind)
            raise typer.BadParameter(f"{text!r} is no kind of event; there are {known}")
        found |= matching
    return frozenset(found)


def _seconds(text: str) -> float:
    match = _TIME.fullmatch(text.strip().lower())
    if match is None:
        raise typer.BadParameter("should be a time such as 30s, 10m or 2h")
    return float(match[1]) * _SECONDS[match[2]]


def events(
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            "-k",
            metavar="KIND",
            help="Such events alone, such as request-finished; node, runner, attempt, breaker or request is all of "
            "them. May be given again.",
            show_default=False,
        ),
    ] = None,
    request: Annotated[
        str, typer.Option("--request", metavar="ID", help="Of this request alone.", show_default=False)
    ] = "",
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="Of this model alone.", show_default=False)
    ] = "",
    caller: Annotated[
        str, typer.Option("--caller", metavar="NAME", help="Of this caller's requests alone.", show_default=False)
    ] = "",
    since: Annotated[
        str,
        typer.Option("--since", metavar="TIME", help="Begin so long ago: 30s, 10m, 2h.", show_default=False),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Show what happens, as it happens: nodes and runners that come and go, attempts that fail or are carried over,
    breakers, requests and their figures. Ctrl-C leaves.

    Every configured coordinator is watched; one that goes away is watched again, from where it was, as soon as it is
    back. Clients see their own requests alone, admins everybody's: client.identity chooses the certificate.
    """
    condition = EventFilter(_kinds(kind or []), request, model, caller)
    since_s = _seconds(since) if since else None

    async def run(mesh: MeshClient) -> None:
        show = _print_json if as_json else _Lines().show
        async with aclosing(mesh.watch_events(condition, since_s=since_s)) as news:
            async for item in news:
                show(item)

    asyncio.run(connected(run, directory=directory, file=config))


class _Lines:
    """Prints news for people; where there is one coordinator, its name would only be in the way."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def show(self, item: EventNews) -> None:
        self._seen.add(item.coordinator)
        match item:
            case SeenEvent():
                line = event_line(item.event)
                if len(self._seen) > 1:
                    line.append(f"  [{item.coordinator}]", style="dim")
                console().print(line, soft_wrap=True)
            case EventsMissing():
                count = f"{item.count} events" if item.count else "events"
                console().print(
                    Text(f"-- {count} of {item.coordinator} {_LOST_TEXTS[item.reason]} --", style="yellow"),
                    soft_wrap=True,
                )
            case CoordinatorLost():
                note(
                    f"[red]{item.coordinator} cannot be watched now[/red] [dim](trying again)[/dim]: {_plain(item.why)}"
                )
            case CoordinatorWatched():
                note(f"[dim]watching {item.coordinator}; Ctrl-C leaves[/dim]")


def _plain(text: str) -> str:
    """A text in which nothing is rich's markup."""
    return text.replace("[", "\\[")


def _print_json(item: EventNews) -> None:
    told: dict[str, Any] = {"coordinator": item.coordinator}
    match item:
        case SeenEvent():
            told["event"] = event_json(item.event)
        case EventsMissing():
            told["missing"] = {"reason": item.reason, "count": item.count}
        case CoordinatorLost():
            told["lost"] = item.why
        case CoordinatorWatched():
            told["watching"] = True
    print_json(told, lines=True)
