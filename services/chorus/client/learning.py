"""What the coordinators of a mesh have learnt of models and strategies, each its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chorus.api.coordinator.v1 import learning_pb2
from chorus.client.caching import of_each
from chorus.client.coordinators import Coordinators
from chorus.core.ensemble.records import Strategy
from chorus.core.errors import NotFoundError, UnavailableError
from chorus.wire.ensemble import STRATEGIES_BACK


@dataclass(frozen=True, slots=True)
class EarnedReward:
    """The rewards of a way of answering in a context; `model` empty: the coordinator chose it."""

    context: str
    strategy: Strategy
    model: str
    count: float
    mean: float


@dataclass(frozen=True, slots=True)
class Learnt:
    """What one coordinator has learnt; `mode` is `off`, `watch` or `on`."""

    mode: str
    frozen: bool
    earned: tuple[EarnedReward, ...]

    @classmethod
    def decode(cls, message: learning_pb2.GetLearningResponse) -> Learnt:
        """Out of its message; strategies that this version doesn't know are left out."""
        earned = (
            EarnedReward(one.context, STRATEGIES_BACK[one.strategy], one.model, one.count, one.mean_reward)
            for one in message.earned
            if one.strategy in STRATEGIES_BACK
        )
        return cls(message.mode, message.frozen, tuple(earned))


@dataclass(frozen=True, slots=True)
class MeshLearning:
    """What was learnt by coordinator, and why the others did not answer."""

    learnt: Mapping[str, Learnt]
    missing: Mapping[str, str]


async def learning_of(coordinators: Sequence[tuple[str, Coordinators]]) -> MeshLearning:
    """Asks everybody at once. Raises UnavailableError where nobody answers."""

    async def ask(coordinator: Coordinators) -> Learnt:
        return Learnt.decode(await coordinator.single("GetLearning", learning_pb2.GetLearningRequest()))

    learnt, missing = await of_each(coordinators, [ask(coordinator) for _, coordinator in coordinators])
    return MeshLearning(learnt, missing)


async def rate_answer(coordinators: Sequence[tuple[str, Coordinators]], request_id: str, rating: float) -> None:
    """Tells whichever coordinator gave the answer. Raises NotFoundError where nobody knows of it."""
    request = learning_pb2.RateResponseRequest(request_id=request_id, rating=rating)
    refusals: list[NotFoundError] = []

    async def ask(coordinator: Coordinators) -> None:
        try:
            await coordinator.single("RateResponse", request)
        except NotFoundError as error:
            refusals.append(error)

    told, _ = await of_each(coordinators, [ask(coordinator) for _, coordinator in coordinators])
    if len(refusals) == len(told):
        raise refusals[0]


async def change_learning(
    coordinators: Sequence[tuple[str, Coordinators]], *, frozen: bool | None, reset: bool
) -> None:
    """Freezes or forgets everywhere. Raises UnavailableError unless everybody did."""
    request = learning_pb2.ChangeLearningRequest(frozen=frozen, reset=reset)
    _, missing = await of_each(
        coordinators, [coordinator.single("ChangeLearning", request) for _, coordinator in coordinators]
    )
    if missing:
        raise UnavailableError(
            f"{', '.join(missing)} could not be asked, and is as it was: {next(iter(missing.values()))}; ask again"
        )
