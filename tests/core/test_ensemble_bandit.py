"""What a bandit learns, against books kept the plain way."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from chorus.core.ensemble.bandit import Bandit, Earned, Outcome, Way, reward_of
from chorus.core.ensemble.records import Strategy
from chorus.core.errors import InvalidRequestError

WAYS = [Way(Strategy.ROUTE, "small"), Way(Strategy.ROUTE, "large"), Way(Strategy.VOTE)]
CONTEXTS = ["sums", "past", ""]
_REWARDS = st.floats(0, 1)


class Learning(RuleBasedStateMachine):
    """A bandit beside a list of all that it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.bandit = Bandit()
        self.told: list[tuple[str, Way, float]] = []

    @rule(context=st.sampled_from(CONTEXTS), way=st.sampled_from(WAYS), reward=_REWARDS)
    def learns(self, context: str, way: Way, reward: float) -> None:
        self.bandit.learn(context, way, reward)
        if not self.bandit.frozen:
            self.told.append((context, way, reward))

    @rule(frozen=st.booleans())
    def freezes(self, frozen: bool) -> None:
        self.bandit.frozen = frozen

    @rule()
    def forgets(self) -> None:
        self.bandit.reset()
        self.told.clear()

    @rule(context=st.sampled_from(CONTEXTS), allowed=st.lists(st.sampled_from(WAYS), min_size=1), seed=st.integers())
    def chooses(self, context: str, allowed: list[Way], seed: int) -> None:
        chosen = self.bandit.choose(context, allowed, Random(seed))
        assert chosen in allowed, "never beyond the caller's limits"
        assert chosen == self.bandit.choose(context, allowed, Random(seed)), "by chance that can be repeated"
        if self.bandit.frozen:
            assert chosen == self.bandit.choose(context, allowed, Random(seed + 1)), "by no chance"

    @invariant()
    def keeps_the_books(self) -> None:
        table = self.bandit.table()
        for context in CONTEXTS:
            for way in WAYS:
                rewards = [reward for own, by, reward in self.told if (own, by) == (context, way)]
                earned = table.get(context, {}).get(way, Earned())
                assert (earned.count, earned.total) == (len(rewards), pytest.approx(sum(rewards)))
                assert 0 < self.bandit.belief(context, way) < 1


TestLearning = Learning.TestCase
TestLearning.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_each_context_comes_to_the_way_that_is_best_there() -> None:
    worth = {("sums", WAYS[0]): 0.8, ("sums", WAYS[1]): 0.2, ("past", WAYS[0]): 0.3, ("past", WAYS[1]): 0.7}
    bandit, rng, late = Bandit(), Random(1), []
    for number in range(800):
        context = ("sums", "past")[number % 2]
        way = bandit.choose(context, WAYS[:2], rng)
        bandit.learn(context, way, float(rng.random() < worth[context, way]))
        if number >= 600:
            late.append(way == (WAYS[0] if context == "sums" else WAYS[1]))
    assert sum(late) > 0.9 * len(late)


def test_a_new_context_begins_with_what_others_taught() -> None:
    bandit = Bandit()
    for _ in range(50):
        bandit.learn("sums", WAYS[0], 1.0)
        bandit.learn("sums", WAYS[1], 0.0)
    assert bandit.belief("new", WAYS[0]) > 0.9 > 0.1 > bandit.belief("new", WAYS[1])


def test_what_changes_is_learnt_anew_where_the_past_fades() -> None:
    fading, lasting = Bandit(keep=0.9), Bandit()
    for bandit in (fading, lasting):
        for reward in [1.0] * 100 + [0.0] * 30:
            bandit.learn("sums", WAYS[0], reward)
    assert fading.belief("sums", WAYS[0]) < 0.3 < lasting.belief("sums", WAYS[0])


@given(st.floats(0, 100), _REWARDS, st.none() | _REWARDS, st.floats(1, 100))
def test_a_reward_is_a_share_and_the_users_word_comes_first(
    took_s: float, confidence: float, rating: float | None, deadline_s: float
) -> None:
    outcome = Outcome(True, took_s, confidence, rating)
    assert 0 <= reward_of(outcome, deadline_s) <= 1
    if rating is not None:
        assert reward_of(outcome, deadline_s) == reward_of(Outcome(True, took_s, 1 - confidence, rating), deadline_s)
    assert reward_of(Outcome(True, 2 * took_s, confidence, rating), deadline_s) <= reward_of(outcome, deadline_s)
    assert reward_of(Outcome(False, took_s, confidence, rating), deadline_s) == 0


def test_what_can_not_be_learnt_is_refused() -> None:
    with pytest.raises(InvalidRequestError):
        Bandit().learn("sums", WAYS[0], 1.5)
    with pytest.raises(InvalidRequestError):
        Bandit().choose("sums", [], Random(1))
