"""One generation of an ensemble as it passes by: what the caller is told of it, and what is kept of it."""

from __future__ import annotations

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.api.inference.v1 import generation_pb2
from chorus.core.ensemble.machine import AskPart, PartAnswered, PartBegun, PartEvent, PartPlaced
from chorus.core.ensemble.records import Answer
from chorus.core.generation import Finished
from chorus.wire.events import decode_event


class Part:
    """A part's stream. Every message of it passes `take`, in order."""

    def __init__(self, action: AskPart, *, wants_logprobs: bool, final_only: bool) -> None:
        """`wants_logprobs`: the caller does; otherwise they are but for us."""
        self.part_id = action.ask.part_id
        self.as_answer = action.as_answer
        self.begun = False
        """Whether some of it was streamed as the answer."""
        self.held: list[bytes] = []
        """What it says before it says anything: an answer that stays blank may still be replaced by another one."""
        self._wants_logprobs = wants_logprobs
        self._is_shown = action.as_answer or not final_only
        self._substitution: bytes | None = None
        self._started = generation_pb2.Started()
        self._deltas: list[generation_pb2.TokenDelta] = []
        self._logprobs: list[float] = []
        self._finished = generation_pb2.Finished()

    def take(self, raw: bytes) -> tuple[list[bytes], PartEvent | None]:
        """What the caller is told, and what has happened, by a message of the part's own stream."""
        message = coordinator_pb2.GenerateResponse.FromString(raw)
        event = message.event
        happened: PartEvent | None = None
        kind = event.WhichOneof("event")
        if message.HasField("substitution"):
            self._substitution = raw
        if kind == "started":
            started = self._started = event.started
            happened = PartPlaced(self.part_id, started.node_id, started.runner_id, started.model)
        elif kind == "attempt_changed":
            changed = event.attempt_changed
            self._started.node_id, self._started.runner_id = changed.node_id, changed.runner_id
            self._started.attempt = changed.attempt
            happened = PartPlaced(self.part_id, changed.node_id, changed.runner_id)
        elif kind == "delta":
            self._keep(event.delta)
            if self.as_answer and not self.begun:
                return self._begin(message)
        elif kind == "finished":
            self._finished = event.finished
            if self.as_answer:  # the verdict comes before it
                return [], PartAnswered(self._answer())
            happened = PartAnswered(self._answer())
        if not self._is_shown:
            return [], happened
        if not self.as_answer:
            message.member_id = self.part_id
        return [message.SerializeToString()], happened

    def beginning(self) -> list[bytes]:
        """The whole part as the answer, but for its end."""
        whole = generation_pb2.TokenDelta()
        for delta in self._deltas:
            whole.token_ids.extend(delta.token_ids)
            whole.logprobs.extend(delta.logprobs)
        # At once: adding to a message's text copies all of it each time.
        whole.text = "".join(delta.text for delta in self._deltas)
        whole.reasoning = "".join(delta.reasoning for delta in self._deltas)
        events = [generation_pb2.GenerationEvent(started=self._started)]
        if self._deltas:
            events.append(generation_pb2.GenerationEvent(delta=whole))
        messages = [coordinator_pb2.GenerateResponse(event=event).SerializeToString() for event in events]
        return messages if self._substitution is None else [self._substitution, *messages]

    def end(self) -> bytes:
        """The answer's Finished."""
        event = generation_pb2.GenerationEvent(finished=self._finished)
        return coordinator_pb2.GenerateResponse(event=event).SerializeToString()

    def _begin(self, message: coordinator_pb2.GenerateResponse) -> tuple[list[bytes], PartEvent | None]:
        self.held.append(message.SerializeToString())
        delta = message.event.delta
        if not (delta.text.strip() or delta.reasoning.strip() or delta.HasField("tool_call")):
            return [], None
        self.begun = True
        told, self.held = self.held, []
        return told, PartBegun(self.part_id)

    def _keep(self, delta: generation_pb2.TokenDelta) -> None:
        self._logprobs.extend(token.logprob for token in delta.logprobs)
        if not self._wants_logprobs:
            del delta.logprobs[:]
        self._deltas.append(delta)

    def _answer(self) -> Answer:
        finished = decode_event(generation_pb2.GenerationEvent(finished=self._finished))
        assert isinstance(finished, Finished), "that is what it was made of"
        return Answer(
            self.part_id,
            "".join(delta.text for delta in self._deltas),
            reason=finished.choices[0].reason,
            logprobs=tuple(self._logprobs) or None,
            tokens=finished.usage.completion_tokens,
            model=self._started.model,
            calls=any(delta.HasField("tool_call") for delta in self._deltas),
        )
