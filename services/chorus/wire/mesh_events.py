"""What happens in the mesh: between `chorus.api.events.v1` and `chorus.core.events`."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format

from chorus.api.events.v1 import events_pb2 as pb
from chorus.api.inference.v1 import generation_pb2
from chorus.api.runner.v1 import resources_pb2
from chorus.core.errors import InvalidRequestError
from chorus.core.events import (
    AttemptFailed,
    AttemptHedged,
    AttemptResumed,
    Batch,
    Bookmark,
    Cursor,
    Detail,
    Event,
    EventFilter,
    EventKind,
    LoadAsked,
    Lost,
    LostReason,
    Outcome,
    RequestAdmitted,
    RequestFinished,
    RequestRefused,
    RequestSubstituted,
    RunnerJoined,
    RunnerLost,
    Subject,
    Told,
)
from chorus.core.fleet.records import EngineKind
from chorus.core.generation import Priority
from chorus.core.placement import LoadReason, Work
from chorus.wire.generation import PRIORITIES
from chorus.wire.resources import ENGINE_KINDS, decode_duration, encode_duration

KINDS: dict[EventKind, pb.EventKind.ValueType] = {
    kind: pb.EventKind.Value(f"EVENT_KIND_{kind.name}") for kind in EventKind
}
WORKS: dict[Work, pb.Work.ValueType] = {work: pb.Work.Value(f"WORK_{work.name}") for work in Work}
OUTCOMES: dict[Outcome, pb.Outcome.ValueType] = {
    outcome: pb.Outcome.Value(f"OUTCOME_{outcome.name}") for outcome in Outcome
}
LOAD_REASONS: dict[LoadReason, pb.LoadReason.ValueType] = {
    reason: pb.LoadReason.Value(f"LOAD_REASON_{reason.name}") for reason in LoadReason
}
LOST_REASONS: dict[LostReason, pb.LostReason.ValueType] = {
    reason: pb.LostReason.Value(f"LOST_REASON_{reason.name}") for reason in LostReason
}
_KINDS_BACK = {value: kind for kind, value in KINDS.items()}
_WORKS_BACK = {value: work for work, value in WORKS.items()}
_OUTCOMES_BACK = {value: outcome for outcome, value in OUTCOMES.items()}
_LOAD_REASONS_BACK = {value: reason for reason, value in LOAD_REASONS.items()}
_LOST_REASONS_BACK = {value: reason for reason, value in LOST_REASONS.items()}
_PRIORITIES_BACK: dict[generation_pb2.Priority.ValueType, Priority] = {value: key for key, value in PRIORITIES.items()}
_ENGINE_KINDS_BACK: dict[resources_pb2.EngineKind.ValueType, EngineKind] = {
    value: key for key, value in ENGINE_KINDS.items()
}


# --- events ---------------------------------------------------------------------------------------------------------


def encode_event(event: Event) -> pb.Event:
    """One thing that happened."""
    subject = event.subject
    message = pb.Event(
        sequence=event.sequence,
        kind=KINDS[event.kind],
        request_id=subject.request_id,
        caller=subject.caller,
        model=subject.model,
        artifact=subject.artifact,
        runner_id=subject.runner_id,
        node_id=subject.node_id,
    )
    message.at.FromNanoseconds(round(event.at * 1e9))
    if event.detail is not None:
        _encode_detail(event.detail, message)
    return message


def _encode_detail(detail: Detail, message: pb.Event) -> None:
    match detail:
        case RunnerJoined():
            joined = message.runner_joined
            joined.SetInParent()
            joined.incarnation, joined.address, joined.replaced = detail.incarnation, detail.address, detail.replaced
        case RunnerLost():
            message.runner_lost.SetInParent()
            message.runner_lost.incarnation = detail.incarnation
        case AttemptFailed():
            message.attempt_failed.CopyFrom(
                pb.AttemptFailed(
                    attempt=detail.attempt, reason=detail.reason, message=detail.message, begun=detail.begun
                )
            )
        case AttemptHedged():
            message.attempt_hedged.CopyFrom(
                pb.AttemptHedged(attempt=detail.attempt, after=encode_duration(detail.after_s))
            )
        case AttemptResumed():
            message.attempt_resumed.CopyFrom(
                pb.AttemptResumed(
                    attempt=detail.attempt,
                    reason=detail.reason,
                    gap=encode_duration(detail.gap_s),
                    output_token_count=detail.output_tokens,
                )
            )
        case RequestAdmitted():
            message.request_admitted.CopyFrom(
                pb.RequestAdmitted(
                    work=WORKS[detail.work],
                    priority=PRIORITIES[detail.priority],
                    queue=encode_duration(detail.queue_s),
                )
            )
        case RequestRefused():
            retry_s = detail.retry_after_s
            message.request_refused.CopyFrom(
                pb.RequestRefused(
                    work=WORKS[detail.work],
                    reason=detail.reason,
                    message=detail.message,
                    retry_after=None if retry_s is None else encode_duration(retry_s),
                    queue=encode_duration(detail.queue_s),
                )
            )
        case LoadAsked():
            message.load_asked.CopyFrom(pb.LoadAsked(reason=LOAD_REASONS[detail.reason], figure=detail.figure))
        case RequestSubstituted():
            message.request_substituted.CopyFrom(
                pb.RequestSubstituted(requested_model=detail.requested_model, reason=detail.reason)
            )
        case RequestFinished():
            message.request_finished.CopyFrom(_encode_finished(detail))


def _encode_finished(detail: RequestFinished) -> pb.RequestFinished:
    first_s = detail.first_token_s
    return pb.RequestFinished(
        work=WORKS[detail.work],
        outcome=OUTCOMES[detail.outcome],
        reason=detail.reason,
        message=detail.message,
        attempt_count=detail.attempts,
        engine_kind=ENGINE_KINDS[detail.engine],
        queue=encode_duration(detail.queue_s),
        time_to_first_token=None if first_s is None else encode_duration(first_s),
        total=encode_duration(detail.total_s),
        prompt_token_count=detail.prompt_tokens,
        cached_token_count=detail.cached_tokens,
        output_token_count=detail.output_tokens,
        tokens_per_second=detail.tokens_per_second,
        cost_micro_usd=detail.cost_micro_usd,
        external=detail.external,
    )


def decode_event(message: pb.Event) -> Event | None:
    """One thing that happened, or None for a kind that this version does not know."""
    kind = _KINDS_BACK.get(message.kind)
    if kind is None:
        return None
    subject = Subject(
        message.request_id, message.caller, message.model, message.artifact, message.runner_id, message.node_id
    )
    return Event(message.sequence, message.at.ToNanoseconds() / 1e9, kind, subject, _decode_detail(message))


def _decode_detail(message: pb.Event) -> Detail | None:
    match message.WhichOneof("detail"):
        case "runner_joined":
            joined = message.runner_joined
            return RunnerJoined(joined.incarnation, joined.address, joined.replaced)
        case "runner_lost":
            return RunnerLost(message.runner_lost.incarnation)
        case "attempt_failed":
            failed = message.attempt_failed
            return AttemptFailed(failed.attempt, failed.reason, failed.message, failed.begun)
        case "attempt_hedged":
            return AttemptHedged(message.attempt_hedged.attempt, decode_duration(message.attempt_hedged.after))
        case "attempt_resumed":
            resumed = message.attempt_resumed
            return AttemptResumed(
                resumed.attempt, resumed.reason, decode_duration(resumed.gap), resumed.output_token_count
            )
        case "request_admitted":
            admitted = message.request_admitted
            return RequestAdmitted(
                _WORKS_BACK.get(admitted.work, Work.GENERATE),
                _PRIORITIES_BACK.get(admitted.priority, Priority.INTERACTIVE),
                decode_duration(admitted.queue),
            )
        case "request_refused":
            refused = message.request_refused
            return RequestRefused(
                _WORKS_BACK.get(refused.work, Work.GENERATE),
                refused.reason,
                refused.message,
                decode_duration(refused.retry_after) if refused.HasField("retry_after") else None,
                decode_duration(refused.queue),
            )
        case "load_asked":
            asked = message.load_asked
            return LoadAsked(_LOAD_REASONS_BACK.get(asked.reason, LoadReason.DEMAND), asked.figure)
        case "request_substituted":
            return RequestSubstituted(message.request_substituted.requested_model, message.request_substituted.reason)
        case "request_finished":
            return _decode_finished(message.request_finished)
        case _:
            return None


def _decode_finished(message: pb.RequestFinished) -> RequestFinished:
    return RequestFinished(
        work=_WORKS_BACK.get(message.work, Work.GENERATE),
        outcome=_OUTCOMES_BACK.get(message.outcome, Outcome.FAILED),
        reason=message.reason,
        message=message.message,
        attempts=message.attempt_count,
        engine=_ENGINE_KINDS_BACK.get(message.engine_kind, EngineKind.LOCAL),
        queue_s=decode_duration(message.queue),
        first_token_s=(
            decode_duration(message.time_to_first_token) if message.HasField("time_to_first_token") else None
        ),
        total_s=decode_duration(message.total),
        prompt_tokens=message.prompt_token_count,
        cached_tokens=message.cached_token_count,
        output_tokens=message.output_token_count,
        tokens_per_second=message.tokens_per_second,
        cost_micro_usd=message.cost_micro_usd,
        external=message.external,
    )


def event_json(event: Event) -> dict[str, Any]:
    """An event as protobuf's JSON has it, with the protos' own names: what programs read from pipes and webhooks."""
    message: dict[str, Any] = json_format.MessageToDict(encode_event(event), preserving_proto_field_name=True)
    return message


# --- watching -------------------------------------------------------------------------------------------------------


def encode_cursor(cursor: Cursor) -> pb.Cursor:
    """A place in a coordinator's events."""
    return pb.Cursor(epoch=cursor.epoch, sequence=cursor.sequence)


def decode_cursor(message: pb.Cursor) -> Cursor:
    """A place in a coordinator's events."""
    return Cursor(message.epoch, message.sequence)


def encode_event_filter(condition: EventFilter) -> pb.EventFilter:
    """Conditions on events; who the reader is, the connection tells."""
    return pb.EventFilter(
        kinds=[KINDS[kind] for kind in sorted(condition.kinds)],
        request_id=condition.request_id,
        model=condition.model,
        caller=condition.caller,
    )


def decode_event_filter(message: pb.EventFilter, *, reader: str) -> EventFilter:
    """Conditions on events. Raises InvalidRequestError for a kind that this version does not know."""
    unknown = [value for value in message.kinds if value not in _KINDS_BACK]
    if unknown:
        raise InvalidRequestError(
            "filter.kinds", f"holds {unknown[0]}, which is no kind of event that this version knows; leave it out"
        )
    kinds = frozenset(_KINDS_BACK[value] for value in message.kinds)
    return EventFilter(kinds, message.request_id, message.model, message.caller, reader)


def encode_told(told: Told) -> pb.WatchedEvents:
    """One message of a watch."""
    message = pb.WatchedEvents(cursor=encode_cursor(told.cursor))
    match told:
        case Batch():
            message.batch.events.extend(encode_event(event) for event in told.events)
        case Lost():
            message.lost.reason = LOST_REASONS[told.reason]
            message.lost.count = told.count
        case Bookmark():
            message.bookmark.SetInParent()
    return message


def decode_told(message: pb.WatchedEvents) -> Told:
    """One message of a watch; what this version does not know counts as a bookmark."""
    cursor = decode_cursor(message.cursor)
    match message.WhichOneof("told"):
        case "batch":
            found = (decode_event(event) for event in message.batch.events)
            events = tuple(event for event in found if event is not None)
            return Batch(cursor, events) if events else Bookmark(cursor)
        case "lost":
            reason = _LOST_REASONS_BACK.get(message.lost.reason, LostReason.LAGGED)
            return Lost(cursor, reason, message.lost.count)
        case _:
            return Bookmark(cursor)
