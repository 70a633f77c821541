"""Ensembles as their caller reads them: the members' events beside each other, the answer's own, the verdict.

A lost coordinator takes the members' work with it. Where nothing of the answer was delivered yet, another one is asked
for the ensemble anew, which is told as `EnsembleRestarted`. After that, what one model alone writes is gone on with as
any generation is; a text that was picked or composed can't be, and the error says that it isn't whole.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.client.answers import Completion
from chorus.client.carrying import Carrying
from chorus.client.stream import EventStream, Generation
from chorus.core.ensemble.records import EnsembleSpec, MemberSpec, Strategy, Verdict
from chorus.core.generation import GenerationRequest
from chorus.wire.ensemble import decode_verdict, encode_ensemble
from chorus.wire.events import ClientEvent, decode_event
from chorus.wire.fallback import decode_substitution

_OBSTACLE = "an ensemble's answer is no single model's; ask again"


@dataclass(frozen=True, slots=True)
class MemberEvent:
    """An event of a member, or of a part that judges, reviews or composes."""

    member_id: str
    event: ClientEvent


@dataclass(frozen=True, slots=True)
class EnsembleRestarted:
    """The coordinator was lost before anything of the answer came: another one begins anew, members and all."""

    coordinator: str


EnsembleEvent: TypeAlias = ClientEvent | MemberEvent | EnsembleRestarted | Verdict


@dataclass(frozen=True, slots=True)
class EnsembleCompletion:
    """An ensemble, whole. `verdict` is None where the coordinator that knew it was lost."""

    completion: Completion
    verdict: Verdict | None

    @property
    def text(self) -> str:
        """The answer."""
        return self.completion.text


class EnsembleCarrying(Carrying):
    """What a client remembers of an ensemble."""

    def __init__(self, message: pb.GenerateRequest, request: GenerationRequest, clock: Callable[[], float]) -> None:
        super().__init__(message, request, clock)
        members = message.ensemble.members
        strategy = encode_ensemble(EnsembleSpec(Strategy.ROUTE)).strategy
        is_route = message.ensemble.strategy in (0, strategy)
        self._is_one_models = is_route and not any(member.instructions for member in members)
        self._asked = False
        self._restarted: EnsembleRestarted | None = None

    @property
    def relayed(self) -> bool:
        """No runner could answer it by itself."""
        return True

    @property
    def obstacle(self) -> str:
        """Why nobody else can go on with the answer."""
        return _OBSTACLE if self.begun and not self._is_one_models else super().obstacle

    def attempt(self, where: str) -> pb.GenerateRequest:
        """The request for the next attempt."""
        message = super().attempt(where)
        if self.begun:
            message.ClearField("ensemble")  # this is the rest of one model's answer
        elif self._asked:
            self._restarted = EnsembleRestarted(where)
        self._asked = True
        return message

    def read(self, message: Any) -> list[Any]:
        """What the caller is told of a message."""
        told: list[Any] = []
        if self._restarted is not None:
            told, self._restarted = [self._restarted], None
        if message.HasField("verdict"):
            return [*told, decode_verdict(message.verdict)]
        if message.member_id:
            return told + _of_member(message)
        return told + super().read(message)


class EnsembleGeneration(EventStream[EnsembleEvent]):
    """Events, as EnsembleSpec's contract has them: those of members, the answer's, its verdict, and Finished.

    Ending it ends all members; their slots are free within a decode step.
    """

    async def completion(self) -> EnsembleCompletion:
        """Reads to the end and returns the answer and its verdict; the iterator must not have been read before."""
        verdicts: list[Verdict] = []
        answer = Generation(answer_of(self._events, verdicts.append))
        return EnsembleCompletion(await answer.completion(), verdicts[-1] if verdicts else None)


async def answer_of(
    events: AsyncGenerator[EnsembleEvent], on_verdict: Callable[[Verdict], None] | None = None
) -> AsyncGenerator[ClientEvent]:
    """The events of the answer alone."""
    try:
        async for event in events:
            if isinstance(event, Verdict):
                if on_verdict is not None:
                    on_verdict(event)
            elif not isinstance(event, MemberEvent | EnsembleRestarted):
                yield event
    finally:
        await events.aclose()


def ensemble_spec(
    strategy: Strategy | str,
    members: tuple[MemberSpec | str, ...] = (),
    **more: Any,
) -> EnsembleSpec:
    """What is asked for; a member may be given as `MODEL` or `MODEL*SAMPLES`. Raises ValueError where there is none."""
    specs = tuple(member if isinstance(member, MemberSpec) else parse_member(member) for member in members)
    return EnsembleSpec(Strategy(strategy), specs, **more)


def parse_member(text: str) -> MemberSpec:
    """`MODEL` or `MODEL*SAMPLES`. Raises ValueError."""
    model, star, count = text.rpartition("*")
    if not star:
        return MemberSpec(text)
    if not model or not count.isdecimal() or not int(count):
        raise ValueError(f"{text!r} should be MODEL or MODEL*SAMPLES, such as smollm2-135m-instruct*3")
    return MemberSpec(model, int(count))


def _of_member(message: pb.GenerateResponse) -> list[MemberEvent]:
    if message.HasField("substitution"):
        return [MemberEvent(message.member_id, decode_substitution(message.substitution))]
    decoded = decode_event(message.event)
    return [] if decoded is None else [MemberEvent(message.member_id, decoded)]
