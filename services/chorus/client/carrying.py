"""What a client remembers of a generation, so that any other coordinator can go on with it when one is lost.

The first coordinator gets the request as it is. Those after a break get it with every token id delivered so far, the
seed that the first attempt drew, and the artifact that it ran. What they begin is told to the caller as AttemptChanged,
and Finished tells of the whole answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.api.coordinator.v1.cache_pb2 import CACHE_MODE_OFF, CACHE_MODE_UNSPECIFIED
from chorus.api.inference.v1 import generation_pb2
from chorus.core.generation import GenerationRequest, Substitution
from chorus.core.resilience.delivered import Delivered
from chorus.wire.cache import decode_cache_report
from chorus.wire.events import AttemptChanged, ClientEvent, StartedAt, decode_event
from chorus.wire.fallback import decode_substitution
from chorus.wire.whole import ask_to_go_on, check_counts, tell_whole


class Carrying:
    """One generation over all of its attempts. `message` says what `request` does; `clock` is monotonic seconds."""

    def __init__(self, message: pb.GenerateRequest, request: GenerationRequest, clock: Callable[[], float]) -> None:
        self._message = message
        self._clock = clock
        self._arrived = self._silent_since = clock()
        self.priority = request.priority
        self.hedged = message.allow_hedging
        self._seed_given = request.sampling.seed is not None
        self._attempt = max(1, message.attempt)
        self._began_on: StartedAt | None = None  # the attempt with the first token
        self._now_on: StartedAt | None = None
        self._substitution: Substitution | None = None  # of the attempt with the first token
        self._held: list[ClientEvent] = []  # what comes once in a stream, until the token after it makes it certain
        self._told = True  # whether the caller knows who goes on
        self._reason = self._where = ""
        self.delivered = Delivered.of(request)
        self.finished = False

    @property
    def begun(self) -> bool:
        """Whether the caller has got part of the answer."""
        return self.delivered.started

    @property
    def obstacle(self) -> str:
        """Why nobody else can go on with what was delivered; empty where somebody can, or nothing was."""
        return self.delivered.obstacle if self.begun else ""

    @property
    def relayed(self) -> bool:
        """Whether only coordinators can answer it, no runner by itself."""
        if self.hedged or self._message.fallback.cached_answer:
            return True
        return self._message.cache.mode not in (CACHE_MODE_UNSPECIFIED, CACHE_MODE_OFF)

    def attempt(self, where: str) -> pb.GenerateRequest:
        """The request for the next attempt, by the coordinator `where`."""
        self._held.clear()
        self._where, self._now_on = where, None
        if not self.begun:
            self._substitution = None
            self._message.attempt = self._attempt
            return self._message
        self.delivered.begin(with_ids=not self.delivered.from_text, can_resume=True)
        message = pb.GenerateRequest()
        message.CopyFrom(self._message)
        message.attempt = self._attempt
        if self._began_on is None:
            return message
        about, spec = self._began_on.started, message.spec
        # Who allowed it for the beginning, by name or in so many words, allows it for the rest.
        named = bool(spec.model) and self._substitution is None
        message.fallback.external = message.fallback.external or named
        # Files of equal content may have another name elsewhere; where there is no digest, the name must do.
        spec.model = "" if about.artifact_sha256 else about.artifact
        seed = None if self._seed_given or self.delivered.from_text else about.seed
        ask_to_go_on(spec, self.delivered, seed=seed, artifact_sha256=about.artifact_sha256)
        return message

    def return_ticket(self, ticket_id: str) -> None:
        """A ticket was granted for it in vain: whoever granted it is told so with the next attempt."""
        self._message.unused_ticket_id = ticket_id

    def failed_at(self, runner_id: str) -> None:
        """The runner that was asked itself has failed: the next attempt says so, and another one comes first there."""
        self._message.failed_runner_id = runner_id

    def broken(self, reason: str) -> None:
        """The attempt ended for this reason before the answer was whole."""
        self._attempt += 1
        if self.begun:
            self._reason, self._told = reason, False
            if self.delivered.last_at is not None:
                self._silent_since = self.delivered.last_at

    def substituted(self, substitution: Substitution) -> None:
        """Another model answers than the one asked for; the caller is told once that is certain."""
        self._substitution = substitution

    def read(self, message: Any) -> list[Any]:
        """What the caller is told of a message of the stream, a runner's or a coordinator's. Raises as `take`."""
        if isinstance(message, pb.GenerateResponse) and message.HasField("substitution"):
            self.substituted(decode_substitution(message.substitution))
        events = self.take(message.event)
        if not isinstance(message, pb.GenerateResponse):
            return events
        for event in message.more:
            events = [*events, *self.take(event)]
        report = decode_cache_report(message.cache) if message.HasField("cache") else None
        return events if report is None else [report, *events]

    def take(self, event: generation_pb2.GenerationEvent) -> list[ClientEvent]:
        """What the caller is told of an attempt's event. Raises EngineError where something was left out."""
        kind = event.WhichOneof("event")
        if kind == "delta":
            return self._take_delta(event)
        if kind == "finished":
            return self._take_finished(event)
        decoded = decode_event(event)
        if decoded is None:  # of a newer coordinator
            return []
        if isinstance(decoded, StartedAt):
            self._now_on = decoded
            self._attempt = max(self._attempt, decoded.origin.attempt)
        elif isinstance(decoded, AttemptChanged):
            self._attempt = max(self._attempt, decoded.attempt)
        if kind == "started" or kind == "prompt_scored":
            if not self.begun:
                self._held.append(decoded)
            return []
        if self._held:
            self._held.append(decoded)
            return []
        return [decoded]

    def _take_delta(self, event: generation_pb2.GenerationEvent) -> list[ClientEvent]:
        delta, delivered = event.delta, self.delivered
        if not self.begun:
            # Which of the two it is, only the engine's first word tells; a coordinator finds out whether it can resume.
            delivered.begin(with_ids=bool(delta.token_ids), can_resume=True)
        index = delivered.take(
            delta.choice,
            delta.index,
            delta.token_ids,
            delta.text,
            more=bool(delta.reasoning) or delta.HasField("tool_call"),
            now=self._clock(),
        )
        if index is None:
            return []
        delta.index = index
        return [*self._begin(), *_decoded(event)]

    def _take_finished(self, event: generation_pb2.GenerationEvent) -> list[ClientEvent]:
        if not self.begun:  # without a token nobody knows whether the engine tells ids, and its count stands
            self.delivered.begin(with_ids=False, can_resume=False)
        counts = check_counts(event.finished, self.delivered)
        if self._reason:
            tell_whole(event.finished, counts, self.delivered, arrived=self._arrived)
        self.finished = True
        return [*self._begin(), *_decoded(event)]

    def _begin(self) -> list[ClientEvent]:
        """Who answers, or goes on with the answer, now that it is certain."""
        now_on = self._now_on
        if self._began_on is None and now_on is not None:
            self._began_on = now_on
            self.delivered.prompt_tokens = now_on.started.prompt_tokens
            self.delivered.cached_tokens = now_on.started.cached_tokens
            if self._substitution is not None:
                self._held.insert(0, self._substitution)
        held, self._held = self._held, []
        if not self._told and now_on is not None:
            self._told = True
            held.insert(0, self._changed(now_on))
        return held

    def _changed(self, now_on: StartedAt) -> AttemptChanged:
        return AttemptChanged(
            attempt=now_on.origin.attempt,
            node_id=now_on.origin.node_id,
            runner_id=now_on.origin.runner_id,
            reason=self._reason,
            gap_s=max(0.0, self._clock() - self._silent_since),
            from_text=self.delivered.from_text,
            coordinator=self._where,
        )


def _decoded(event: generation_pb2.GenerationEvent) -> list[ClientEvent]:
    decoded = decode_event(event)
    return [] if decoded is None else [decoded]
