"""Events: what happened, to whom, with which figures. Immutable; durations are seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from chorus.core.fleet.records import EngineKind
from chorus.core.generation import Priority
from chorus.core.placement.needs import Work
from chorus.core.placement.replicas import LoadReason


class EventKind(StrEnum):
    """What kind of thing happened."""

    NODE_JOINED = "node_joined"
    NODE_LOST = "node_lost"
    RUNNER_JOINED = "runner_joined"
    RUNNER_LOST = "runner_lost"
    RUNNER_DRAINING = "runner_draining"
    RUNNER_UNREACHABLE = "runner_unreachable"
    RUNNER_REACHABLE = "runner_reachable"
    ATTEMPT_FAILED = "attempt_failed"
    ATTEMPT_HEDGED = "attempt_hedged"
    ATTEMPT_RESUMED = "attempt_resumed"
    BREAKER_OPENED = "breaker_opened"
    BREAKER_HALF_OPEN = "breaker_half_open"
    BREAKER_CLOSED = "breaker_closed"
    REQUEST_ADMITTED = "request_admitted"
    REQUEST_REFUSED = "request_refused"
    REQUEST_FINISHED = "request_finished"
    REQUEST_SUBSTITUTED = "request_substituted"
    LOAD_ASKED = "load_asked"


class Outcome(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom an event concerns; what does not apply is empty. `model` is a family, where that is known."""

    request_id: str = ""
    caller: str = ""
    model: str = ""
    artifact: str = ""
    runner_id: str = ""
    node_id: str = ""


@dataclass(frozen=True, slots=True)
class RunnerJoined:
    """A runner is there; `replaced` says that an earlier process of it was."""

    incarnation: int
    address: str
    replaced: bool


@dataclass(frozen=True, slots=True)
class RunnerLost:
    """A runner has left the directory."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """A try of a request failed; `begun`: the caller had got part of the answer."""

    attempt: int
    reason: str
    message: str
    begun: bool


@dataclass(frozen=True, slots=True)
class AttemptHedged:
    """A second try was started beside one that had shown no token for so long."""

    attempt: int
    after_s: float


@dataclass(frozen=True, slots=True)
class AttemptResumed:
    """Another runner goes on with an answer, of which the caller had got so many tokens."""

    attempt: int
    reason: str
    gap_s: float
    output_tokens: int


@dataclass(frozen=True, slots=True)
class LoadAsked:
    """A runner was asked to load a model beforehand; `figure` is that of placement's Wanted."""

    reason: LoadReason
    figure: float


@dataclass(frozen=True, slots=True)
class RequestAdmitted:
    """A request's turn has come."""

    work: Work
    priority: Priority
    queue_s: float


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """No runner was asked for a request."""

    work: Work
    reason: str
    message: str
    retry_after_s: float | None = None
    queue_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestSubstituted:
    """Another model, the event's, answers than the one that was asked for; `reason` is an error's."""

    requested_model: str
    reason: str


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """A request that some runner was asked for has ended. `first_token_s` and `total_s` count from its arrival.

    `external`: a paid provider was asked for it, or for a part of it.
    """

    work: Work
    outcome: Outcome
    reason: str = ""
    message: str = ""
    attempts: int = 1
    engine: EngineKind = EngineKind.LOCAL
    queue_s: float = 0.0
    first_token_s: float | None = None
    total_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    tokens_per_second: float = 0.0
    cost_micro_usd: int = 0
    external: bool = False


Detail: TypeAlias = (
    RunnerJoined
    | RunnerLost
    | AttemptFailed
    | AttemptHedged
    | AttemptResumed
    | LoadAsked
    | RequestAdmitted
    | RequestRefused
    | RequestSubstituted
    | RequestFinished
)

KIND_OF: Mapping[type[Detail], EventKind] = {
    RunnerJoined: EventKind.RUNNER_JOINED,
    RunnerLost: EventKind.RUNNER_LOST,
    AttemptFailed: EventKind.ATTEMPT_FAILED,
    AttemptHedged: EventKind.ATTEMPT_HEDGED,
    AttemptResumed: EventKind.ATTEMPT_RESUMED,
    LoadAsked: EventKind.LOAD_ASKED,
    RequestAdmitted: EventKind.REQUEST_ADMITTED,
    RequestRefused: EventKind.REQUEST_REFUSED,
    RequestSubstituted: EventKind.REQUEST_SUBSTITUTED,
    RequestFinished: EventKind.REQUEST_FINISHED,
}
"""The kind of each detail; kinds that are missing here have none."""

OF_REQUESTS = frozenset(
    {
        EventKind.ATTEMPT_FAILED,
        EventKind.ATTEMPT_HEDGED,
        EventKind.ATTEMPT_RESUMED,
        EventKind.REQUEST_ADMITTED,
        EventKind.REQUEST_REFUSED,
        EventKind.REQUEST_FINISHED,
        EventKind.REQUEST_SUBSTITUTED,
    }
)
"""Kinds that happen to somebody's request, and so are not everybody's business."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `at` is seconds since the Unix epoch; sequences rise by one."""

    sequence: int
    at: float
    kind: EventKind
    subject: Subject
    detail: Detail | None = None


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Conditions on events; all that are set must hold.

    `model` is a family or an artifact, `caller` a SPIFFE id or its end after a slash. `reader` is who asks, where that
    one may know of nobody's requests but its own.
    """

    kinds: frozenset[EventKind] = frozenset()
    request_id: str = ""
    model: str = ""
    caller: str = ""
    reader: str = ""

    def matches(self, event: Event) -> bool:
        """Whether an event is to be told."""
        subject = event.subject
        if self.kinds and event.kind not in self.kinds:
            return False
        if self.reader and event.kind in OF_REQUESTS and subject.caller != self.reader:
            return False
        if self.request_id and subject.request_id != self.request_id:
            return False
        if self.model and self.model not in (subject.model, subject.artifact):
            return False
        return not self.caller or subject.caller == self.caller or subject.caller.endswith(f"/{self.caller}")
