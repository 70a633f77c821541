"""The cache on the wire: modes and reports, what makes two requests one, answers as they are kept and given again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from chorus.api.coordinator.v1 import cache_pb2, coordinator_pb2
from chorus.api.inference.v1 import generation_pb2
from chorus.core.cache.policy import CacheMode
from chorus.core.cache.report import CacheOutcome, CacheReport
from chorus.core.errors import InvalidRequestError
from chorus.core.generation import GenerationRequest
from chorus.wire.generation import encode_generation
from chorus.wire.resources import decode_duration, encode_duration

# As many tokens come at once when an answer is given again: few enough that a client may stop in the middle.
_TOKENS_AT_ONCE = 16
# What comes in one message, to callers who read that.
_BYTES_TOGETHER = 64 << 10

# Of LENGTH the limit is part of the request.
_KEPT = frozenset(
    (
        generation_pb2.FINISH_REASON_END,
        generation_pb2.FINISH_REASON_STOP,
        generation_pb2.FINISH_REASON_LENGTH,
        generation_pb2.FINISH_REASON_TOOL_CALL,
    )
)

MODES: dict[CacheMode, cache_pb2.CacheMode.ValueType] = {
    mode: cache_pb2.CacheMode.Value(f"CACHE_MODE_{mode.name}") for mode in CacheMode
}
_MODES_BACK = {value: mode for mode, value in MODES.items()}


_OUTCOMES = {outcome: cache_pb2.CacheOutcome.Value(f"CACHE_OUTCOME_{outcome.name}") for outcome in CacheOutcome}
_OUTCOMES_BACK = {value: outcome for outcome, value in _OUTCOMES.items()}


def decode_mode(policy: coordinator_pb2.CachePolicy) -> CacheMode | None:
    """What a request asks for; None where it says nothing. Raises InvalidRequestError."""
    if policy.mode == cache_pb2.CACHE_MODE_UNSPECIFIED:
        return None
    if policy.mode not in _MODES_BACK:
        raise InvalidRequestError("cache.mode", f"{policy.mode} is no mode that this version knows")
    return _MODES_BACK[policy.mode]


def encode_policy(mode: CacheMode, max_age_s: float | None = None) -> coordinator_pb2.CachePolicy:
    """A request's policy, of a caller that reads several events of one message."""
    age = None if max_age_s is None else encode_duration(max_age_s)
    return coordinator_pb2.CachePolicy(mode=MODES[mode], max_age=age, reads_more=True)


def encode_report(report: CacheReport) -> cache_pb2.CacheReport:
    """Its message."""
    return cache_pb2.CacheReport(
        outcome=_OUTCOMES[report.outcome],
        age=None if report.age_s is None else encode_duration(report.age_s),
        question=report.question,
        similarity=report.similarity,
        confidence=report.confidence,
        reason=report.reason,
    )


def decode_cache_report(message: cache_pb2.CacheReport) -> CacheReport | None:
    """Out of its message; None where its outcome is of a newer version."""
    outcome = _OUTCOMES_BACK.get(message.outcome)
    if outcome is None:
        return None
    return CacheReport(
        outcome,
        decode_duration(message.age) if message.HasField("age") else None,
        message.question,
        message.similarity,
        message.confidence,
        message.reason,
    )


def digest_of(*parts: str, request: GenerationRequest) -> str:
    """One SHA-256 for all equal requests with equal parts, whoever encoded them."""
    told = hashlib.sha256(encode_generation(request).SerializeToString(deterministic=True))
    for part in parts:
        told.update(len(part).to_bytes(8, "big") + part.encode("utf-8", "surrogatepass"))
    return told.hexdigest()


@dataclass(frozen=True, slots=True)
class Recorded:
    """A whole answer, ready to be kept."""

    sha256: str
    answer: bytes
    tokens: int
    text: str


def record(messages: Iterable[bytes]) -> Recorded | None:
    """The answer in a stream's messages; None where it is one that is not to be given again.

    Those are answers of members and of stand-ins, ones that broke off and were gone on with, those by an artifact whose
    content nobody vouches for, and those that were cut off where another runner, with a larger context, goes on.
    """
    kept = cache_pb2.StoredAnswer()
    sha256, text, whole = "", "", False
    for raw in messages:
        message = coordinator_pb2.GenerateResponse.FromString(raw)
        event, kind = message.event, message.event.WhichOneof("event")
        if message.member_id or message.HasField("substitution") or kind == "attempt_changed":
            return None
        if kind == "started":
            sha256 = event.started.artifact_sha256
        if kind == "delta":
            text += event.delta.text
            _join(kept, event)
        elif kind in ("started", "prompt_scored", "finished"):
            kept.events.append(event)
        whole = kind == "finished" and all(outcome.reason in _KEPT for outcome in event.finished.choices)
    if not whole or not sha256:
        return None
    return Recorded(sha256, kept.SerializeToString(), kept.events[-1].finished.usage.completion_token_count, text)


def _join(kept: cache_pb2.StoredAnswer, event: generation_pb2.GenerationEvent) -> None:
    """Adds a delta to the one before it, where that is of the same choice and the two make no long one."""
    new, last = event.delta, kept.events[-1].delta if kept.events else generation_pb2.TokenDelta()
    follows = last.choice == new.choice and last.token_ids and last.index + len(last.token_ids) == new.index
    alone = new.HasField("tool_call") or last.HasField("tool_call")
    if follows and new.token_ids and not alone and len(last.token_ids) + len(new.token_ids) <= _TOKENS_AT_ONCE:
        last.token_ids.extend(new.token_ids)
        last.logprobs.extend(new.logprobs)
        last.text += new.text
        last.reasoning += new.reasoning
    else:
        kept.events.append(event)


def replay(answer: bytes, report: CacheReport | None, *, request_id: str, together: bool) -> Iterator[bytes]:
    """The messages that give a kept answer again, to this request, after a report where there is one.

    `together`: in as few messages as are not large. Raises ValueError where it is no answer.
    """
    try:
        events = cache_pb2.StoredAnswer.FromString(answer).events
    except DecodeError as error:
        raise ValueError("this is no answer that was kept") from error
    message = coordinator_pb2.GenerateResponse()
    if report is not None:
        message.cache.CopyFrom(encode_report(report))
        if not together:
            yield message.SerializeToString()
            message.Clear()
    size = 0
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "started":
            event.started.request_id = request_id
            event.started.attempt = 1
        elif kind == "finished":
            event.finished.ClearField("timings")  # of then, not of now
        size += event.ByteSize()
        if message.HasField("event") and (not together or size > _BYTES_TOGETHER):
            yield message.SerializeToString()
            message.Clear()
            size = event.ByteSize()
        if message.HasField("event"):
            message.more.append(event)
        else:
            message.event.CopyFrom(event)
    yield message.SerializeToString()


def renamed(raw: bytes, *, request_id: str) -> tuple[bytes, bool]:
    """A message of another request's stream as this one's, and whether it was the one that names the request."""
    message = coordinator_pb2.GenerateResponse.FromString(raw)
    if message.event.WhichOneof("event") != "started":
        return raw, False
    message.event.started.request_id = request_id
    return message.SerializeToString(), True


def text_of(answer: bytes) -> str:
    """The text of a kept answer."""
    return "".join(event.delta.text for event in cache_pb2.StoredAnswer.FromString(answer).events)
