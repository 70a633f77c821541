"""An event as a line for people."""

from __future__ import annotations

from datetime import datetime

from rich.text import Text

from chorus.core.events import (
    AttemptFailed,
    AttemptHedged,
    AttemptResumed,
    Event,
    EventKind,
    LoadAsked,
    Outcome,
    RequestAdmitted,
    RequestFinished,
    RequestRefused,
    RequestSubstituted,
    RunnerJoined,
)
from chorus.core.generation import Priority
from chorus.core.placement import LoadReason, Work

_BAD = "red"
_STYLES = {
    EventKind.NODE_LOST: _BAD,
    EventKind.RUNNER_LOST: _BAD,
    EventKind.RUNNER_UNREACHABLE: _BAD,
    EventKind.ATTEMPT_FAILED: _BAD,
    EventKind.BREAKER_OPENED: _BAD,
    EventKind.REQUEST_REFUSED: "yellow",
    EventKind.REQUEST_SUBSTITUTED: "yellow",
    EventKind.RUNNER_DRAINING: "yellow",
    EventKind.ATTEMPT_HEDGED: "yellow",
    EventKind.ATTEMPT_RESUMED: "yellow",
    EventKind.BREAKER_HALF_OPEN: "yellow",
    EventKind.NODE_JOINED: "green",
    EventKind.RUNNER_JOINED: "green",
    EventKind.RUNNER_REACHABLE: "green",
    EventKind.BREAKER_CLOSED: "green",
}
_KIND_WIDTH = max(len(kind) for kind in EventKind)
_ID_LENGTH = 8


def event_line(event: Event) -> Text:
    """When, what, to whom, and the particulars."""
    at = datetime.fromtimestamp(event.at).astimezone().strftime("%H:%M:%S.%f")[:-3]
    failed = isinstance(event.detail, RequestFinished) and event.detail.outcome is Outcome.FAILED
    style = _BAD if failed else _STYLES.get(event.kind, "")
    return Text.assemble(
        (at, "dim"), "  ", (f"{event.kind.replace('_', ' '):{_KIND_WIDTH}}", style), "  ", printable(_what(event))
    )


def printable(text: str) -> str:
    """A text that others may have made up, without what would steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _what(event: Event) -> str:
    subject, detail = event.subject, event.detail
    match detail:
        case None:
            return " ".join(filter(None, (_where(event), subject.artifact)))
        case RunnerJoined():
            again = " again" if detail.replaced else ""
            return f"{_where(event)}{again} at {detail.address}"
        case AttemptFailed():
            begun = " in mid-answer" if detail.begun else ""
            return (
                f"{_request(event)} try {detail.attempt} on {_where(event)}{begun}: {detail.reason}, {detail.message}"
            )
        case AttemptHedged():
            waited = f"after {detail.after_s:.2f} s without a token"
            return f"{_request(event)} try {detail.attempt} on {_where(event)} {waited}"
        case AttemptResumed():
            return (
                f"{_request(event)} goes on at {_where(event)} after {detail.output_tokens} tokens and "
                f"{detail.gap_s:.2f} s: {detail.reason}"
            )
        case LoadAsked():
            by_demand = f"{detail.figure:.1f} requests a slot where it is loaded"
            why = by_demand if detail.reason is LoadReason.DEMAND else f"{detail.figure:.0%} likely to be asked for"
            return f"{subject.artifact} on {_where(event)}: {why}"
        case RequestAdmitted():
            urgency = "" if detail.priority is Priority.INTERACTIVE else f" {detail.priority}"
            waited = f" after {detail.queue_s:.2f} s" if detail.queue_s >= 0.005 else ""
            return f"{_request(event)}{urgency}{_work(detail.work)} for {_asked(event)}{waited}"
        case RequestRefused():
            again = f" (again in {detail.retry_after_s:.1f} s)" if detail.retry_after_s is not None else ""
            return f"{_request(event)} for {_asked(event)}: {detail.reason}, {detail.message}{again}"
        case RequestSubstituted():
            return f"{_request(event)} for {_asked(event)} in place of {detail.requested_model}: {detail.reason}"
        case RequestFinished():
            return f"{_request(event)} {_finished(event, detail)}"
        case _:
            return _where(event)


def _finished(event: Event, detail: RequestFinished) -> str:
    parts = [f"{detail.outcome}{_work(detail.work)} on {_where(event)} for {_asked(event)}"]
    if detail.work is Work.GENERATE:
        parts.append(f"{detail.output_tokens} tokens")
    if detail.first_token_s is not None:
        parts.append(f"first after {detail.first_token_s:.2f} s")
    if detail.tokens_per_second:
        parts.append(f"{detail.tokens_per_second:.1f} tokens/s")
    if detail.queue_s >= 0.005:
        parts.append(f"queued {detail.queue_s:.2f} s")
    parts.append(f"{detail.total_s:.2f} s in all")
    if detail.attempts > 1:
        parts.append(f"{detail.attempts} tries")
    if detail.reason:
        parts.append(f"{detail.reason}: {detail.message}")
    return ", ".join(parts)


def _where(event: Event) -> str:
    subject = event.subject
    if not subject.runner_id:
        return subject.node_id
    return f"{subject.runner_id} ({subject.node_id})" if subject.node_id else subject.runner_id


def _request(event: Event) -> str:
    return event.subject.request_id[:_ID_LENGTH]


def _asked(event: Event) -> str:
    """The model and the caller, the latter without its mesh."""
    subject = event.subject
    caller = subject.caller.rpartition("/")[2]
    return f"{subject.model or 'any model'}{f' by {caller}' if caller else ''}"


def _work(work: Work) -> str:
    return "" if work is Work.GENERATE else f" {work.replace('_', ' ')}"
