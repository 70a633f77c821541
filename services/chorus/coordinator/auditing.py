"""What a coordinator notes in its audit log: who asked for what, what became of it, who cleared the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.api.inference.v1 import content_pb2, generation_pb2
from chorus.core.audit import DeedKind, Fact, Trail
from chorus.core.audit.refusals import Refusals
from chorus.core.errors import ChorusError
from chorus.core.events import Event, RequestFinished, RequestRefused
from chorus.telemetry import context
from chorus.transport.peer import current_caller

_NAME_MAX = 100
_PROMPT_MAX = 1 << 16

Asked: TypeAlias = pb.GenerateRequest | pb.PlaceRequest | pb.EmbedRequest | pb.RerankRequest


class Auditing:
    """Notes deeds in a trail; prompts only where `prompts`. `clock` is monotonic, in seconds."""

    def __init__(self, trail: Trail, *, prompts: bool, clock: Callable[[], float]) -> None:
        self._trail = trail
        self._prompts = prompts
        self._clock = clock
        self._refusals = Refusals()

    def received(self, what: str, request: Asked) -> None:
        """Somebody asks for a model. Noted before anything else is done, cached answers included."""
        facts: dict[str, Fact] = {"what": what}
        if (call := context.current()) is not None:
            facts["request_id"] = call.request_id
        if self._prompts:
            facts["prompt"] = "\n".join(_texts(request.spec))[:_PROMPT_MAX]
        self._note(DeedKind.REQUEST_RECEIVED, request.spec.model, **facts)

    def denied(self, model: str, error: ChorusError) -> None:
        """Somebody asks for what his scopes or quotas leave out; one entry stands for many of a kind."""
        before = self._refusals.unnoted(str(current_caller() or ""), error.reason, self._clock())
        if before is None:
            return
        left_out = {key: error.metadata[key] for key in ("scope", "quota") if key in error.metadata}
        self._note(DeedKind.REQUEST_REFUSED, model, reason=error.reason, unnoted=before, **left_out)

    def cache_cleared(self, *, everybody: bool, forgotten: int) -> None:
        """Somebody had cached answers forgotten."""
        self._note(DeedKind.CACHE_CLEARED, "", everybody=everybody, forgotten=forgotten)

    def take(self, event: Event) -> None:
        """Something happened; the end of a request is noted, whoever waits for it."""
        subject, facts = event.subject, dict[str, Fact](request_id=event.subject.request_id)
        match event.detail:
            case RequestFinished() as finished:
                kind = DeedKind.REQUEST_FINISHED
                facts |= {
                    "outcome": finished.outcome.value,
                    "runner": subject.runner_id,
                    "prompt_tokens": finished.prompt_tokens,
                    "output_tokens": finished.output_tokens,
                }
                facts |= {"reason": finished.reason} if finished.reason else {}
            case RequestRefused() as refused:
                kind = DeedKind.REQUEST_REFUSED
                facts |= {"reason": refused.reason}
            case _:
                return
        self._trail.note(kind, by=subject.caller, target=(subject.artifact or subject.model)[:_NAME_MAX], **facts)

    def _note(self, kind: DeedKind, model: str, **facts: Fact) -> None:
        self._trail.note(kind, by=str(current_caller() or ""), target=model[:_NAME_MAX], **facts)


def _texts(spec: Any) -> Iterable[str]:
    """What a model is to read, as text; pictures and token ids are left out."""
    if isinstance(spec, generation_pb2.GenerationSpec):
        if spec.HasField("conversation"):
            for message in spec.conversation.messages:
                role = content_pb2.MessageRole.Name(message.role).removeprefix("MESSAGE_ROLE_").lower()
                yield f"{role}: {' '.join(part.text for part in message.parts if part.HasField('text'))}"
        elif spec.prompt:
            yield spec.prompt
    elif hasattr(spec, "documents"):
        yield spec.query
        yield from spec.documents
    else:
        yield from (one.text for one in spec.inputs if one.text)
