"""An answer as it arrives: text to standard output, what goes on meanwhile and how it went to standard error."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import chorus.cli.quiet  # noqa: F401
from chorus.cli.output import console, err, print_json
from chorus.cli.wrapping import WordWrap
from chorus.client import AttemptChanged, ClientEvent, Generation, StartedAt
from chorus.core.cache.report import CacheOutcome, CacheReport
from chorus.core.costs.purse import usd
from chorus.core.generation import Finished, Phase, Progress, PromptScored, Queued, Substitution, TokenDelta

if TYPE_CHECKING:
    from rich.status import Status

_SILENCE_S = 0.5
_PHASES = {
    Phase.LOADING: "loading the model",
    Phase.PREFILL: "reading the prompt",
    Phase.DOWNLOADING: "fetching the model",
    Phase.VERIFYING: "checking the model's file",
}
# Why a runner no longer answers, by the error's reason.
_LOST = {
    "UNAVAILABLE": "was lost",
    "CANCELLED": "was lost",
    "DRAINING": "is leaving the mesh",
    "ENGINE_FAILED": "had trouble with its engine",
    "OUT_OF_MEMORY": "ran out of memory",
}
# Why no runner serves a model, by the error's reason.
_NOT_SERVED = {
    "UNKNOWN_MODEL": "no runner has it",
    "RUNNERS_UNAVAILABLE": "no runner that has it can be asked now",
    "NO_CAPABLE_RUNNER": "no runner can serve this with it",
    "UNSUPPORTED_FEATURE": "it can't do what this needs",
    "PROMPT_TOO_LONG": "its context is too short for this",
    "OUT_OF_MEMORY": "it can't be loaded now",
}
# As the protos call them, so that what is piped from here and from grpcurl reads alike.
_EVENTS: dict[type[ClientEvent], str] = {
    Queued: "queued",
    Progress: "progress",
    Substitution: "substitution",
    CacheReport: "cache",
    StartedAt: "started",
    PromptScored: "prompt_scored",
    TokenDelta: "delta",
    AttemptChanged: "attempt_changed",
    Finished: "finished",
}
# What a terminal would obey instead of showing: everything below space but the line feed, and the upper controls.
FOR_TERMINAL: dict[int, str | None] = dict.fromkeys((*range(10), *range(11, 32), *range(127, 160)))
FOR_TERMINAL[9] = "    "


@dataclass
class Answer:
    """What has come of one generation."""

    text: list[str] = field(default_factory=list)
    started: StartedAt | None = None
    substitution: Substitution | None = None
    cache: CacheReport | None = None
    changes: list[AttemptChanged] = field(default_factory=list)
    finished: Finished | None = None
    asked_at: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    elapsed_s: float = 0.0

    def take(self, event: ClientEvent) -> None:
        """Adds an event."""
        match event:
            case TokenDelta():
                if self.first_token_s is None:
                    self.first_token_s = time.monotonic() - self.asked_at
                self.text.append(event.text)
            case StartedAt():
                self.started = event
            case Substitution():
                self.substitution = event
            case CacheReport():
                self.cache = event
            case AttemptChanged():
                self.changes.append(event)
            case Finished():
                self.finished = event
                self.elapsed_s = time.monotonic() - self.asked_at

    @property
    def whole(self) -> str:
        """The text so far."""
        return "".join(self.text)

    @property
    def runner_id(self) -> str:
        """Who answered, or took over last."""
        if self.changes:
            return self.changes[-1].runner_id
        return self.started.origin.runner_id if self.started is not None else ""

    @property
    def node_id(self) -> str:
        """Where that was."""
        if self.changes:
            return self.changes[-1].node_id
        return self.started.origin.node_id if self.started is not None else ""

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        about = asdict(self.started.started) if self.started is not None else {}
        finished = self.finished
        return {
            "text": self.whole,
            "finish_reason": finished.choices[0].reason if finished is not None and finished.choices else None,
            **about,
            "substitution": asdict(self.substitution) if self.substitution is not None else None,
            "cache": asdict(self.cache) if self.cache is not None else None,
            "node_id": self.node_id,
            "runner_id": self.runner_id,
            "request_id": self.started.origin.request_id if self.started is not None else None,
            "attempts": self.changes[-1].attempt if self.changes else 1,
            "usage": asdict(finished.usage) if finished is not None else None,
            "timings": asdict(finished.timings) if finished is not None else None,
            "time_to_first_token_s": self.first_token_s,
            "elapsed_s": self.elapsed_s,
        }

    def stats(self) -> str:
        """One line on who answered, and how fast."""
        parts = [f"{self.node_id}/{self.runner_id}"]
        if self.started is not None:
            parts.append(self.started.started.artifact)
        if self.finished is not None:
            usage = self.finished.usage
            parts.append(f"{usage.prompt_tokens} in, {usage.completion_tokens} out")
            parts += [usd(usage.cost_micro_usd)] if usage.cost_micro_usd else []
        if self.first_token_s is not None:
            parts.append(f"{self.first_token_s:.2f} s to first token")
        if self.finished is not None and self.finished.timings.tokens_per_second:
            parts.append(f"{self.finished.timings.tokens_per_second:.1f} tokens/s")
        if self.cache is not None:
            parts.append(f"cache: {self.cache.outcome}")
        return "  ".join(parts)


async def stream_text(generation: Generation, answer: Answer | None = None) -> Answer:
    """Prints the answer as it comes; what is slow before it is told on a terminal after half a second.

    Where it is broken off, what has come until then is in `answer`.
    """
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    wrap = WordWrap(console().width) if sys.stdout.isatty() else None
    answer, waiting = answer or Answer(), _Waiting()
    try:
        async with generation:
            async for event in generation:
                before = answer.runner_id
                answer.take(event)
                if isinstance(event, TokenDelta):
                    waiting.end()
                    if event.text:
                        sys.stdout.write(wrap.feed(event.text.translate(FOR_TERMINAL)) if wrap else event.text)
                        sys.stdout.flush()
                elif isinstance(event, AttemptChanged):
                    waiting.end()
                    _say(going_on(event, before), wrap)
                elif isinstance(event, Substitution):
                    waiting.end()
                    _say(standing_in(event), wrap)
                elif isinstance(event, CacheReport):
                    if line := of_the_cache(event):
                        waiting.end()
                        _say(line, wrap)
                else:
                    waiting.hears(event)
    finally:
        waiting.end()
        if answer.whole and not answer.whole.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()
    return answer


def going_on(changed: AttemptChanged, before: str) -> str:
    """One line for a person on who goes on with an answer, and why; `before` is the runner that had it."""
    if changed.coordinator:
        what = f"the coordinator was lost; the one at {changed.coordinator.rpartition('@')[2]} goes on"
    elif changed.runner_id == before:
        what = f"{before} {_LOST.get(changed.reason, 'broke off')}, and goes on itself"
    else:
        what = f"{before} {_LOST.get(changed.reason, 'broke off')}; {changed.runner_id} goes on"
    from_text = ", from the text alone, so that a word may be repeated" if changed.from_text else ""
    return f"{what} where it stopped{from_text} ({changed.gap_s:.1f} s without a word)"


def standing_in(substitution: Substitution) -> str:
    """One line for a person on which model answers in place of another, and why."""
    why = _NOT_SERVED.get(substitution.reason, "its runners fail")
    return f"{substitution.model} answers in place of {substitution.requested_model}: {why}"


def of_the_cache(report: CacheReport) -> str:
    """One line for a person, where an answer was given before or the cache did less than asked; else nothing."""
    age = "" if report.age_s is None else f", {_age(report.age_s)} old"
    match report.outcome:
        case CacheOutcome.SEMANTIC:
            return f"the answer to “{report.question.translate(FOR_TERMINAL)}”{age}"
        case CacheOutcome.STALE:
            return f"an earlier answer{age}: {report.reason}"
        case CacheOutcome.BYPASSED:
            return f"not from the cache: {report.reason}"
        case _:
            return report.reason


def _age(seconds: float) -> str:
    for size, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"


def _say(line: str, wrap: WordWrap | None) -> None:
    """On a line of its own, below the text so far; where the text goes elsewhere, it is not touched."""
    from rich.text import Text

    if wrap is not None:
        sys.stdout.write(wrap.break_line())
        sys.stdout.flush()
    err().print(Text(line, "dim"), soft_wrap=not err().is_terminal)


async def stream_events(generation: Generation) -> Answer:
    """Prints every event as a line of JSON."""
    answer = Answer()
    async with generation:
        async for event in generation:
            answer.take(event)
            print_json(event_facts(event), lines=True)
    return answer


def event_facts(event: ClientEvent) -> dict[str, Any]:
    """An event as an object of JSON."""
    facts = {**asdict(event.origin), **asdict(event.started)} if isinstance(event, StartedAt) else asdict(event)
    return {"event": _EVENTS[type(event)], **facts}


class _Waiting:
    """Says on a terminal what goes on, once silence has lasted."""

    def __init__(self) -> None:
        self._words = "waiting for a runner"
        self._status: Status | None = None
        self._timer = asyncio.get_running_loop().call_later(_SILENCE_S, self._begin) if err().is_terminal else None

    def hears(self, event: ClientEvent) -> None:
        """Something that comes before the first token."""
        match event:
            case Queued(position=position):
                self._words = f"queued behind {position}" if position else "queued, next in line"
            case Progress(phase=phase, done=done, total=total):
                share = f" ({min(done / total, 1):.0%})" if total else ""
                self._words = _PHASES[phase] + share
            case StartedAt():
                self._words = f"{event.origin.runner_id} begins"
        if self._status is not None:
            self._status.update(self._words)

    def end(self) -> None:
        """The wait is over; may be called again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _begin(self) -> None:
        self._status = err().status(self._words, spinner="dots")
        self._status.start()
