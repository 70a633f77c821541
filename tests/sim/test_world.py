"""The simulated mesh: nothing is lost in it, runs repeat, and the policies differ where they should."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.sim import (
    Chorus,
    Fleet,
    LeastLoaded,
    Machine,
    Outcome,
    Plan,
    Policy,
    RoundRobin,
    Trouble,
    TwoChoices,
    World,
    make_fleet,
    simulate,
)

POLICIES = [RoundRobin, LeastLoaded, TwoChoices, Chorus]
SHORT = Plan(seconds=4.0, warm_s=0.0, requests_per_second=60.0, tokens=30.0, coordinators=2)
troubles = st.lists(
    st.tuples(st.floats(0.0, 3.0), st.floats(3.0, 6.0), st.sampled_from(list(Trouble)), st.floats(0.0, 0.3)), max_size=3
)


@pytest.mark.parametrize("policy", POLICIES)
@given(troubles=troubles, seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_each_request_ends_once(
    policy: Callable[[Random], Policy], troubles: list[tuple[float, float, Trouble, float]], seed: int
) -> None:
    fleet = make_fleet(10, Random(seed), troubles)
    world = World(fleet, SHORT, policy, seed)
    outcome = world.run()
    assert outcome.asked > 0
    assert outcome.answered + outcome.failed == outcome.asked
    assert not world.open
    assert all(not machine.running and not machine.queue for machine in fleet.machines)
    assert all(wait > 0.0 for wait in outcome.waits_s)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_repeats_a_run(policy: Callable[[Random], Policy]) -> None:
    def run(seed: int) -> Outcome:
        return simulate(make_fleet(20, Random(4), [(1.0, 3.0, Trouble.SLOW, 0.2)]), SHORT, policy, seed)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_what_fails_at_once_draws_everything_but_here() -> None:
    plan = Plan(seconds=8.0, warm_s=0.0, requests_per_second=400.0, tokens=30.0)

    def share(policy: Callable[[Random], Policy]) -> float:
        return simulate(make_fleet(40, Random(2), [(1.0, 8.0, Trouble.FAILS, 0.1)]), plan, policy).share_on(
            Trouble.FAILS
        )

    assert share(LeastLoaded) > 0.5
    assert share(Chorus) < 0.02


def test_the_dead_are_not_asked_and_their_requests_go_on() -> None:
    machines = [Machine("one", 10.0, 4), Machine("other", 10.0, 4)]
    plan = Plan(seconds=3.0, warm_s=0.0, requests_per_second=2.0, tokens=20.0, coordinators=1)
    outcome = simulate(Fleet(machines, [(2.0, 0, Trouble.DEAD)]), plan, Chorus)
    assert outcome.failed == 0
    assert outcome.attempts > outcome.asked  # somebody's runner died
    assert outcome.attempts_on[Trouble.DEAD] == 0


class Blind(Chorus):
    """One that can't tell its own requests from others' in a report, as with runners of an older version."""

    def named(self, coordinator: str) -> None:
        """It has no name."""


def mean_wait(policy: Callable[[Random], Policy], coordinators: int) -> float:
    """At 85% of what equal machines can decode, whose reports are up to a second old; the mean of three runs."""
    waits: list[float] = []
    for seed in range(3):
        fleet = Fleet([Machine(f"r{number}", 50.0, 8) for number in range(12)])
        rate = 0.85 * fleet.tokens_per_second / 40.0
        plan = Plan(seconds=7.0, requests_per_second=rate, tokens=40.0, spread=0.5, coordinators=coordinators)
        waits += simulate(fleet, plan, policy, seed).waits_s
    return sum(waits) / len(waits)


def test_several_coordinators_that_see_the_same_old_reports_do_not_herd() -> None:
    alone = mean_wait(Chorus, 1)
    for coordinators in (2, 4):
        together, blind = mean_wait(Chorus, coordinators), mean_wait(Blind, coordinators)
        assert together < 1.06 * alone
        assert together - alone < 0.5 * (blind - alone)


def test_nobody_is_left() -> None:
    plan = Plan(seconds=2.0, warm_s=0.0, requests_per_second=5.0, tokens=20.0, coordinators=1)
    outcome = simulate(Fleet([Machine("only", 10.0, 1)], [(0.0, 0, Trouble.DEAD)]), plan, Chorus)
    assert (outcome.answered, outcome.failed) == (0, outcome.asked)
