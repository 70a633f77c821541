"""What a bandit chooses among for a request, and what it is told of how the answer fared."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from chorus.core.ensemble.bandit import Bandit, Outcome, Rng, Way, reward_of
from chorus.core.ensemble.choosing import Offer
from chorus.core.ensemble.complexity import estimate_complexity
from chorus.core.ensemble.learned import LEARNED
from chorus.core.ensemble.prompts import question_of
from chorus.core.ensemble.records import EnsembleSpec, MemberSpec, Strategy
from chorus.core.ensemble.weighing import kind_of
from chorus.core.errors import InvalidRequestError, NotFoundError
from chorus.core.generation import GenerationRequest

# Answers that may still be rated.
_MOST_OPEN = 1000
_USUAL_DEADLINE_S = 60.0


class LearningMode(StrEnum):
    """What is done with outcomes."""

    OFF = "off"
    WATCH = "watch"  # learnt, and nothing done with it
    ON = "on"  # `auto` goes by it


@dataclass(frozen=True, slots=True)
class Choice:
    """How a request is answered, and in which context that is judged."""

    context: str
    way: Way


def context_of(spec: EnsembleSpec, request: GenerationRequest) -> str:
    """The kind of a question where it is a known one, else how hard it is."""
    kind = kind_of(question_of(request.prompt), LEARNED.kinds)
    return kind or str(spec.complexity or estimate_complexity(request))


def ways_of(spec: EnsembleSpec, request: GenerationRequest, available: Sequence[Offer]) -> tuple[Way, ...]:
    """The ways that a caller leaves open: whoever names a strategy has it; whoever names models, or tools, has no other
    models. No paid model is chosen. The first one is what is done without learning."""
    if spec.strategy is not Strategy.AUTO:
        return (Way(spec.strategy),)
    ways = [Way(Strategy.AUTO)]
    if request.tools:
        return tuple(ways)
    own = [offer for offer in available if not offer.external]
    if len(spec.members) != 1 and not request.model:
        ways += [Way(Strategy.CASCADE), Way(Strategy.VOTE)]
    if not spec.members and not request.model:
        ways += [Way(Strategy.ROUTE, offer.model) for offer in own]
    return tuple(ways)


def by_way(spec: EnsembleSpec, way: Way) -> EnsembleSpec:
    """What a caller asks for, in that way."""
    return replace(spec, strategy=way.strategy, members=(MemberSpec(way.model),) if way.model else spec.members)


@dataclass(slots=True)
class Learner:
    """A bandit with the answers that may still be rated, by caller and request id."""

    mode: LearningMode
    rng: Rng
    bandit: Bandit = field(default_factory=Bandit)
    _open: OrderedDict[tuple[str, str], tuple[Choice, Outcome, float]] = field(default_factory=OrderedDict)

    def choose(self, spec: EnsembleSpec, request: GenerationRequest, available: Sequence[Offer]) -> Choice:
        """How to answer."""
        ways, context = ways_of(spec, request, available), context_of(spec, request)
        way = self.bandit.choose(context, ways, self.rng) if self.mode is LearningMode.ON else ways[0]
        return Choice(context, way)

    def ended(self, caller: str, request_id: str, choice: Choice, outcome: Outcome, deadline_s: float | None) -> None:
        """An answer is whole, or has failed, for which one would have waited `deadline_s`."""
        wait_s = deadline_s if deadline_s is not None else _USUAL_DEADLINE_S
        if self.mode is LearningMode.OFF:
            return
        self.bandit.learn(choice.context, choice.way, reward_of(outcome, wait_s))
        if outcome.succeeded:
            self._open[caller, request_id] = (choice, outcome, wait_s)
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)

    def rate(self, caller: str, request_id: str, rating: float) -> None:
        """Somebody has read an answer of theirs: another reward, besides that of its confidence. Rating it once more
        changes nothing. Raises InvalidRequestError, and NotFoundError for an answer that isn't known (any more)."""
        if not 0.0 <= rating <= 1.0:
            raise InvalidRequestError("rating", f"is {rating}; it goes from 0 to 1")
        found = self._open.get((caller, request_id))
        if found is None:
            raise NotFoundError(
                "no such answer of an ensemble is known here: it was given by another coordinator, too long ago, to "
                "somebody else, or ensemble.learning is off"
            )
        choice, outcome, wait_s = found
        if outcome.rating is None:
            rated = replace(outcome, rating=rating)
            self._open[caller, request_id] = (choice, rated, wait_s)
            self.bandit.learn(choice.context, choice.way, reward_of(rated, wait_s))

    def change(self, *, frozen: bool | None, reset: bool) -> None:
        """Freezes it or not, and forgets."""
        if frozen is not None:
            self.bandit.frozen = frozen
        if reset:
            self.bandit.reset()
            self._open.clear()
