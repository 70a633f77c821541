"""An ensemble as it arrives: its members side by side on a terminal, line by line elsewhere, then answer and verdict.

The answer goes to standard output; what the members say, and the verdict, to standard error.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from chorus.cli.answering import FOR_TERMINAL, Answer, event_facts
from chorus.cli.output import err, print_json
from chorus.client import EnsembleEvent, EnsembleGeneration, EnsembleRestarted, MemberEvent, StartedAt, Verdict
from chorus.core.ensemble.records import MemberOutcome, MemberState
from chorus.core.generation import Finished, TokenDelta

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_LEAST_WIDTH = 32
_LINES = 8
_STYLES = {
    MemberState.ANSWERED: "green",
    MemberState.LATE: "yellow",
    MemberState.FAILED: "red",
    MemberState.SKIPPED: "dim",
    MemberState.UNNEEDED: "dim",
}


@dataclass
class Panel:
    """What a member has said so far."""

    text: str = ""
    where: str = ""
    finished: bool = False
    told: int = 0  # characters that were printed already, where nothing can be changed any more


@dataclass
class EnsembleAnswer:
    """What has come of one ensemble."""

    answer: Answer = field(default_factory=Answer)
    panels: dict[str, Panel] = field(default_factory=dict)
    verdict: Verdict | None = None

    def take(self, event: EnsembleEvent) -> None:
        """Adds an event."""
        match event:
            case Verdict():
                self.verdict = event
            case EnsembleRestarted():
                self.panels.clear()
            case MemberEvent(member_id, of_member):
                panel = self.panels.setdefault(member_id, Panel())
                if isinstance(of_member, TokenDelta):
                    panel.text += of_member.text
                elif isinstance(of_member, StartedAt):
                    panel.where = f"{of_member.started.model} on {of_member.origin.runner_id}"
                panel.finished = panel.finished or isinstance(of_member, Finished)
            case _:
                self.answer.take(event)

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        verdict = self.verdict
        counts = {} if verdict is None else {str(state): verdict.count(state) for state in MemberState}
        return {
            **self.answer.to_json(),
            "verdict": None if verdict is None else {**asdict(verdict), "asked": verdict.asked, **counts},
            "member_texts": {name: panel.text for name, panel in self.panels.items()},
        }


async def read_ensemble(generation: EnsembleGeneration) -> EnsembleAnswer:
    """Reads it and shows nothing."""
    whole = EnsembleAnswer()
    async with generation:
        async for event in generation:
            whole.take(event)
    return whole


async def stream_ensemble_events(generation: EnsembleGeneration) -> EnsembleAnswer:
    """Prints every event as a line of JSON."""
    whole = EnsembleAnswer()
    async with generation:
        async for event in generation:
            whole.take(event)
            match event:
                case MemberEvent(member_id, of_member):
                    facts = {"member_id": member_id, **event_facts(of_member)}
                case Verdict():
                    facts = {"event": "verdict", **asdict(event)}
                case EnsembleRestarted():
                    facts = {"event": "restarted", **asdict(event)}
                case _:
                    facts = {"member_id": "", **event_facts(event)}
            print_json(facts, lines=True)
    return whole


async def stream_ensemble(generation: EnsembleGeneration) -> EnsembleAnswer:
    """Shows the members as they write, then the answer."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    whole, live = EnsembleAnswer(), _live()
    with live or nullcontext():
        async with generation:
            async for event in generation:
                whole.take(event)
                if isinstance(event, MemberEvent | EnsembleRestarted):
                    if live is not None:
                        live.update(_side_by_side(whole.panels))
                    elif isinstance(event, MemberEvent):
                        _tell_lines(event.member_id, whole.panels[event.member_id])
                elif isinstance(event, TokenDelta):
                    if live is not None:
                        live.stop()
                    sys.stdout.write(event.text.translate(FOR_TERMINAL) if sys.stdout.isatty() else event.text)
                    sys.stdout.flush()
    if whole.answer.whole and not whole.answer.whole.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    return whole


def show_verdict(verdict: Verdict) -> None:
    """The members one below the other, and what is to be said of all."""
    from rich.table import Table
    from rich.text import Text

    if err().is_terminal:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for title in ("member", "model", "node", "runner", "state", "time", "tokens", "confidence", "agrees with"):
            table.add_column(title)
        for outcome in verdict.members:
            cells = [Text(cell) for cell in _cells(outcome)]
            cells[4].stylize(_STYLES[outcome.state])
            table.add_row(*cells)
        err().print(table)
    else:
        for outcome in verdict.members:
            err().print(Text("  ".join(filter(None, _cells(outcome)))), soft_wrap=True)
    err().print(Text(summary(verdict), "dim" if err().is_terminal else ""), soft_wrap=True)


def summary(verdict: Verdict) -> str:
    """One line on how it fared."""
    counts = [f"{verdict.count(state)} {state}" for state in MemberState if verdict.count(state)]
    parts = [
        f"{verdict.strategy}, {verdict.complexity}" if verdict.complexity is not None else str(verdict.strategy),
        f"{verdict.asked} asked: {', '.join(counts)}",
        f"agreement {verdict.agreement:.0%}",
        f"coherence {verdict.coherence:.2f}",
        f"confidence {verdict.confidence:.2f}",
        f"by {verdict.answered_by}" if verdict.answered_by else "composed",
        f"{verdict.elapsed_s:.1f} s",
    ]
    if verdict.fallback_count:
        parts.append("a simpler set of members answered")
    return "  ".join(parts)


def _cells(outcome: MemberOutcome) -> list[str]:
    answered = outcome.state is MemberState.ANSWERED
    return [
        outcome.member_id,
        outcome.model,
        outcome.node_id,
        outcome.runner_id,
        f"{outcome.state} ({outcome.reason})" if outcome.reason else str(outcome.state),
        f"{outcome.took_s:.1f} s" if outcome.state is not MemberState.SKIPPED else "",
        str(outcome.tokens) if answered else "",
        f"{outcome.confidence:.2f}" if answered else "",
        ", ".join(outcome.agrees_with),
    ]


def _live() -> Live | None:
    """Where members are shown side by side; None where standard error is no terminal."""
    if not err().is_terminal:
        return None
    from rich.live import Live

    return Live(console=err(), refresh_per_second=12, transient=False)


def _side_by_side(panels: dict[str, Panel]) -> RenderableType:
    from rich.panel import Panel as Box
    from rich.table import Table
    from rich.text import Text

    width = err().width
    columns = max(1, min(len(panels), width // _LEAST_WIDTH))
    grid = Table.grid(expand=True)
    for _ in range(columns):
        grid.add_column(ratio=1)
    # Two cells of border and two of padding on each side.
    inner = max(8, width // columns - 4)
    lines = max(2, min(_LINES, err().height // -(-len(panels) // columns) - 3))
    boxes = [
        Box(
            Text("\n".join(_last_lines(panel.text.translate(FOR_TERMINAL), inner, lines))),
            title=Text(name, "bold"),
            subtitle=Text(panel.where, "dim"),
            height=lines + 2,
            border_style="green" if panel.finished else "cyan",
        )
        for name, panel in panels.items()
    ]
    for start in range(0, len(boxes), columns):
        grid.add_row(*boxes[start : start + columns])
    return grid


def _last_lines(text: str, width: int, count: int) -> list[str]:
    from rich.text import Text

    # What lies far behind is not seen, and would be wrapped anew for every token.
    tail = text[-width * count * 2 :]
    return [line.plain for line in Text(tail).wrap(err(), width)][-count:]


def _tell_lines(name: str, panel: Panel) -> None:
    """Prints what a member has said in whole lines; the rest once it has ended."""
    until = len(panel.text) if panel.finished else panel.text.rfind("\n") + 1
    said, panel.told = panel.text[panel.told : until], max(panel.told, until)
    for line in filter(str.strip, said.splitlines()):
        sys.stderr.write(f"{name}: {line.translate(FOR_TERMINAL)}\n")
    sys.stderr.flush()
