"""What is learnt from answers of ensembles, and how far a bandit may choose."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.ensemble.bandit import Outcome, Way
from chorus.core.ensemble.choosing import Offer
from chorus.core.ensemble.learning import Choice, Learner, LearningMode, by_way, context_of, ways_of
from chorus.core.ensemble.records import Complexity, EnsembleSpec, MemberSpec, Strategy
from chorus.core.errors import InvalidRequestError, NotFoundError
from chorus.core.fleet.records import Tier
from chorus.core.generation import Tool
from tests.core.ensemble_world import request

OFFERS = (Offer("large", Tier.FULL, 7), Offer("small", Tier.SMALL, 1), Offer("paid", Tier.LARGE, 70, external=True))
CHOICE = Choice("sums", Way(Strategy.VOTE))
GOOD = Outcome(succeeded=True, took_s=0.0, confidence=0.5)
SPECS = st.builds(
    EnsembleSpec,
    strategy=st.sampled_from(Strategy),
    members=st.lists(st.sampled_from([MemberSpec("small"), MemberSpec("large", 2)]), max_size=2).map(tuple),
)


@given(SPECS, st.sampled_from(["", "small"]), st.booleans(), st.sampled_from(LearningMode), st.integers())
def test_no_choice_is_beyond_what_the_caller_leaves_open(
    spec: EnsembleSpec, model: str, tools: bool, mode: LearningMode, seed: int
) -> None:
    asked = replace(request(), model=model, tools=(Tool("f", "F.", {"type": "object"}),) if tools else ())
    way = Learner(mode, Random(seed)).choose(spec, asked, OFFERS).way
    told = by_way(spec, way)
    assert way in ways_of(spec, asked, OFFERS)
    assert way.model != "paid"
    if spec.strategy is not Strategy.AUTO or mode is not LearningMode.ON:
        assert told == spec, "what is asked for is done"
    if spec.members or model or tools:
        assert told.members == spec.members
    if tools:
        assert told.strategy is spec.strategy


def test_an_answer_is_rated_once_by_whom_it_was_for() -> None:
    learner = Learner(LearningMode.WATCH, Random(1))
    learner.ended("ann", "r1", CHOICE, GOOD, 30.0)
    with pytest.raises(NotFoundError):
        learner.rate("bob", "r1", 1.0)
    with pytest.raises(InvalidRequestError):
        learner.rate("ann", "r1", float("nan"))
    for rating in (1.0, 0.0):
        learner.rate("ann", "r1", rating)
    earned = learner.bandit.table()["sums"][CHOICE.way]
    assert (earned.count, earned.total) == (2, 1.5)
    learner.change(frozen=None, reset=True)
    assert not learner.bandit.table()
    with pytest.raises(NotFoundError):
        learner.rate("ann", "r1", 1.0)


def test_what_failed_is_worth_nothing_and_isnt_rated() -> None:
    learner = Learner(LearningMode.ON, Random(1))
    learner.ended("ann", "r1", CHOICE, replace(GOOD, succeeded=False), None)
    assert learner.bandit.table()["sums"][CHOICE.way].mean == 0.0
    with pytest.raises(NotFoundError):
        learner.rate("ann", "r1", 1.0)


def test_where_it_is_off_or_frozen_nothing_is_learnt() -> None:
    off, frozen = Learner(LearningMode.OFF, Random(1)), Learner(LearningMode.ON, Random(1))
    frozen.change(frozen=True, reset=False)
    for learner in (off, frozen):
        learner.ended("ann", "r1", CHOICE, GOOD, 30.0)
        assert not learner.bandit.table()


def test_only_the_latest_thousand_can_be_rated() -> None:
    learner = Learner(LearningMode.WATCH, Random(1))
    for number in range(1001):
        learner.ended("ann", str(number), CHOICE, GOOD, 30.0)
    learner.rate("ann", "1", 1.0)
    with pytest.raises(NotFoundError, match="too long ago"):
        learner.rate("ann", "0", 1.0)


def test_the_context_is_the_kind_or_how_hard_it_is() -> None:
    assert context_of(EnsembleSpec(), request("What is 5 + 7?")) == "sums"
    assert context_of(EnsembleSpec(complexity=Complexity.EXPERT), request("Name a song.")) == "expert"
