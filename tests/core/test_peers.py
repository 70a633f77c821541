"""Who is asked next: against a model of calls and failures, and what that means for one caller and for many."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chorus.core.resilience.peers import Peers

places = st.integers(0, 3)


class PeersMachine(RuleBasedStateMachine):
    """The model: how many calls each has, and who failed, in the order of their failures."""

    @initialize(first=places)
    def begin(self, first: int) -> None:
        self.peers = Peers(4, first)
        self.calls = Counter[int]()
        self.failed: list[int] = []
        self.now = -10.0

    @rule(place=places)
    def call(self, place: int) -> None:
        self.peers.began(place)
        self.calls[place] += 1

    @rule(place=places)
    def end(self, place: int) -> None:
        if self.calls[place]:
            self.peers.ended(place)
            self.calls[place] -= 1

    @rule(place=places)
    def fail(self, place: int) -> None:
        self.now += 1.0
        self.peers.failed(place, self.now)
        self.failed = [*(other for other in self.failed if other != place), place]

    @rule(place=places, answers=st.booleans())
    def recover(self, place: int, answers: bool) -> None:
        (self.peers.answered if answers else self.peers.recovered)(place)
        self.failed = [other for other in self.failed if other != place]

    @rule(without=st.sets(places))
    def choose(self, without: set[int]) -> None:
        chosen = self.peers.choose(without)
        left = {0, 1, 2, 3} - without
        well = left - set(self.failed)
        if not left:
            assert chosen is None
        elif well:
            assert chosen in well
            assert self.calls[chosen] == min(self.calls[place] for place in well)
        else:
            assert chosen == next(place for place in self.failed if place in left)

    @invariant()
    def knows_of_others(self) -> None:
        for place in range(4):
            assert self.peers.others(place) is bool({0, 1, 2, 3} - set(self.failed) - {place})


TestPeers = PeersMachine.TestCase


@given(st.integers(1, 5), st.integers(0, 20))
def test_an_idle_caller_stays_where_it_began(count: int, first: int) -> None:
    peers = Peers(count, first)
    for _ in range(3):
        assert peers.choose() == first % count
        peers.answered(first % count)


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 40))
def test_many_calls_at_once_are_spread_evenly(count: int, first: int, calls: int) -> None:
    peers, at = Peers(count, first), Counter[int]()
    for _ in range(calls):
        place = peers.choose()
        assert place is not None
        peers.began(place)
        peers.answered(place)
        at[place] += 1
    assert max(at.values(), default=0) - min((at[place] for place in range(count)), default=0) <= 1
