"""Events of a generation's stream: between `chorus.api.inference.v1.GenerationEvent` and `chorus.core.generation`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from chorus.api.inference.v1 import generation_pb2 as pb
from chorus.core import generation as core
from chorus.core.cache.report import CacheReport
from chorus.wire.generation import encode_tool_call
from chorus.wire.resources import decode_duration, encode_duration

PHASES: dict[core.Phase, pb.Phase.ValueType] = {phase: pb.Phase.Value(f"PHASE_{phase.name}") for phase in core.Phase}
FINISH_REASONS: dict[core.FinishReason, pb.FinishReason.ValueType] = {
    reason: pb.FinishReason.Value(f"FINISH_REASON_{reason.name}") for reason in core.FinishReason
}
_PHASES_BACK = {value: phase for phase, value in PHASES.items()}
_FINISH_REASONS_BACK = {value: reason for reason, value in FINISH_REASONS.items()}


@dataclass(frozen=True, slots=True)
class Origin:
    """Who makes a stream's events, and for which request; told in its Started event."""

    request_id: str
    node_id: str
    runner_id: str
    incarnation: int
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class StartedAt:
    """A Started event together with its origin, as a client sees it."""

    started: core.Started
    origin: Origin


@dataclass(frozen=True, slots=True)
class AttemptChanged:
    """Another runner took over; `gap_s` is how long nothing was delivered.

    `coordinator` is the address of the coordinator that goes on where the one before was lost; else it is empty.
    """

    attempt: int
    node_id: str
    runner_id: str
    reason: str
    gap_s: float
    from_text: bool
    coordinator: str = ""


ClientEvent: TypeAlias = (
    core.Queued
    | core.Progress
    | core.Substitution
    | CacheReport
    | StartedAt
    | core.PromptScored
    | core.TokenDelta
    | AttemptChanged
    | core.Finished
)


def encode_event(event: core.Event, origin: Origin, into: pb.GenerationEvent) -> None:
    """Writes an engine's event into its message, which is empty."""
    match event:
        case core.TokenDelta():
            _encode_delta(event, into.delta)
        case core.Queued():
            into.queued.position = event.position
            if event.estimated_wait_s is not None:
                into.queued.estimated_wait.CopyFrom(encode_duration(event.estimated_wait_s))
        case core.Progress():
            into.progress.CopyFrom(encode_progress(event))
        case core.Started():
            into.started.CopyFrom(_encode_started(event, origin))
        case core.PromptScored():
            into.prompt_scored.SetInParent()
            into.prompt_scored.tokens.extend([_encode_logprob(token) for token in event.tokens])
        case core.Finished():
            into.finished.CopyFrom(_encode_finished(event))


def decode_event(message: pb.GenerationEvent) -> ClientEvent | None:
    """An event, or None for one of a newer version that this one does not know."""
    match message.WhichOneof("event"):
        case "delta":
            return _decode_delta(message.delta)
        case "queued":
            queued = message.queued
            wait = decode_duration(queued.estimated_wait) if queued.HasField("estimated_wait") else None
            return core.Queued(queued.position, wait)
        case "progress":
            return decode_progress(message.progress)
        case "started":
            return _decode_started(message.started)
        case "prompt_scored":
            return core.PromptScored(tuple(_decode_logprob(token) for token in message.prompt_scored.tokens))
        case "attempt_changed":
            changed = message.attempt_changed
            return AttemptChanged(
                changed.attempt,
                changed.node_id,
                changed.runner_id,
                changed.reason,
                decode_duration(changed.gap),
                changed.from_text,
            )
        case "finished":
            return _decode_finished(message.finished)
        case _:
            return None


def encode_progress(progress: core.Progress) -> pb.Progress:
    """Slow work."""
    return pb.Progress(phase=PHASES[progress.phase], done=progress.done, total=progress.total)


def decode_progress(message: pb.Progress) -> core.Progress | None:
    """Slow work, or None where its phase is of a newer version."""
    phase = _PHASES_BACK.get(message.phase)
    return None if phase is None else core.Progress(phase, message.done, message.total)


def _encode_started(event: core.Started, origin: Origin) -> pb.Started:
    return pb.Started(
        request_id=origin.request_id,
        node_id=origin.node_id,
        runner_id=origin.runner_id,
        incarnation=origin.incarnation,
        attempt=origin.attempt,
        model=event.model,
        artifact=event.artifact,
        artifact_sha256=event.artifact_sha256,
        prompt_token_count=event.prompt_tokens,
        cached_token_count=event.cached_tokens,
        seed=event.seed,
        context_length=event.context_length,
    )


def _decode_started(message: pb.Started) -> StartedAt:
    return StartedAt(
        started=core.Started(
            model=message.model,
            artifact=message.artifact,
            artifact_sha256=message.artifact_sha256,
            prompt_tokens=message.prompt_token_count,
            cached_tokens=message.cached_token_count,
            seed=message.seed,
            context_length=message.context_length,
        ),
        origin=Origin(
            request_id=message.request_id,
            node_id=message.node_id,
            runner_id=message.runner_id,
            incarnation=message.incarnation,
            attempt=message.attempt,
        ),
    )


def _encode_delta(delta: core.TokenDelta, message: pb.TokenDelta) -> None:
    # In place, and only where there is something to set: this runs for every token.
    message.choice, message.index = delta.choice, delta.index
    message.token_ids.extend(delta.token_ids)
    message.text = delta.text
    if delta.logprobs:
        message.logprobs.extend([_encode_logprob(token) for token in delta.logprobs])
    if delta.reasoning:
        message.reasoning = delta.reasoning
    if delta.tool_call is not None:
        message.tool_call.CopyFrom(encode_tool_call(delta.tool_call))


def _decode_delta(message: pb.TokenDelta) -> core.TokenDelta:
    call = message.tool_call
    return core.TokenDelta(
        choice=message.choice,
        index=message.index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=tuple(_decode_logprob(token) for token in message.logprobs),
        reasoning=message.reasoning,
        tool_call=(core.ToolCall(call.id, call.name, call.arguments_json) if message.HasField("tool_call") else None),
    )


def _encode_logprob(token: core.TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=token.token_id,
        logprob=token.logprob,
        bytes=token.bytes,
        alternatives=[
            pb.Alternative(token_id=other.token_id, logprob=other.logprob, bytes=other.bytes)
            for other in token.alternatives
        ],
    )


def _decode_logprob(message: pb.TokenLogprob) -> core.TokenLogprob:
    return core.TokenLogprob(
        token_id=message.token_id,
        logprob=message.logprob,
        bytes=message.bytes,
        alternatives=tuple(
            core.Alternative(other.token_id, other.logprob, other.bytes) for other in message.alternatives
        ),
    )


def _encode_finished(event: core.Finished) -> pb.Finished:
    timings = event.timings
    return pb.Finished(
        choices=[
            pb.ChoiceOutcome(
                choice=choice.choice,
                reason=FINISH_REASONS[choice.reason],
                token_count=choice.token_count,
                stop_string=choice.stop_string,
            )
            for choice in event.choices
        ],
        usage=encode_usage(event.usage),
        timings=pb.Timings(
            queue=encode_duration(timings.queue_s),
            load=encode_duration(timings.load_s),
            prefill=encode_duration(timings.prefill_s),
            time_to_first_token=encode_duration(timings.time_to_first_token_s),
            decode=encode_duration(timings.decode_s),
            tokens_per_second=timings.tokens_per_second,
        ),
    )


def _decode_finished(message: pb.Finished) -> core.Finished:
    timings = message.timings
    return core.Finished(
        choices=tuple(
            core.ChoiceOutcome(
                choice.choice,
                # A reason of a newer version still is an end.
                _FINISH_REASONS_BACK.get(choice.reason, core.FinishReason.END),
                choice.token_count,
                choice.stop_string,
            )
            for choice in message.choices
        ),
        usage=decode_usage(message.usage),
        timings=core.Timings(
            queue_s=decode_duration(timings.queue),
            load_s=decode_duration(timings.load),
            prefill_s=decode_duration(timings.prefill),
            time_to_first_token_s=decode_duration(timings.time_to_first_token),
            decode_s=decode_duration(timings.decode),
            tokens_per_second=timings.tokens_per_second,
        ),
    )


def encode_usage(usage: core.Usage) -> pb.Usage:
    """What a request used."""
    return pb.Usage(
        prompt_token_count=usage.prompt_tokens,
        cached_token_count=usage.cached_tokens,
        completion_token_count=usage.completion_tokens,
        cost_micro_usd=usage.cost_micro_usd,
    )


def decode_usage(message: pb.Usage) -> core.Usage:
    """What a request used."""
    return core.Usage(
        message.prompt_token_count, message.cached_token_count, message.completion_token_count, message.cost_micro_usd
    )
