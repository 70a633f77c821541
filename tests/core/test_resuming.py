"""When a stream that broke off goes on: waiting, asking again, and the end of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core import errors
from chorus.core.errors import ChorusError, UnavailableError
from chorus.core.resilience.resuming import Hold, Place, ResumePolicy, Resuming
from chorus.core.resilience.retries import GiveUp, RetryBudget

POLICY = ResumePolicy(wait_s=10.0, fruitless=3, most=16, again_after_s=0.1)
GONE = UnavailableError("gone")
NOBODY = errors.RunnersUnavailableError("no runner is left")


def empty() -> RetryBudget:
    return RetryBudget(ratio=0.0, floor_per_s=0.0, reserve=0.0)


def resuming(policy: ResumePolicy = POLICY, budget: RetryBudget | None = None) -> Resuming:
    return Resuming(policy, budget if budget is not None else RetryBudget())


def broken(
    stream: Resuming, delivered: int, now: float, error: ChorusError = GONE, runner_id: str = "r1"
) -> GiveUp | None:
    return stream.broken(error, runner_id, delivered=delivered, obstacle="", now=now)


def test_it_is_placed_at_once_on_others_and_soon_on_anybody() -> None:
    stream = resuming()
    assert broken(stream, 5, 100.0) is None
    assert stream.failed == {"r1"}
    step = stream.look(100.0)
    assert isinstance(step, Place)
    assert (step.anybody, step.seconds) == (False, pytest.approx(0.1))
    assert isinstance(again := stream.look(100.11), Place)
    assert again.anybody


def test_it_is_given_up_once_the_wait_is_over_and_says_what_was_delivered() -> None:
    stream = resuming()
    broken(stream, 5, 100.0)
    now = 100.0
    while not isinstance(step := stream.look(now), GiveUp):
        assert isinstance(step, Place)
        stream.refused(NOBODY)
        now += max(step.seconds, 0.001)
    assert now == pytest.approx(110.0, abs=0.01)
    error = step.error
    assert type(error) is UnavailableError
    assert error.message == (
        "gone; the answer broke off after 5 tokens, and nobody could go on with it within 10 s (no runner is left)"
    )
    assert error.metadata == {"delivered_tokens": "5", "cause": "UNAVAILABLE"}


def test_who_was_stopped_while_it_waited_looks_around_once_more() -> None:
    stream = resuming()
    broken(stream, 5, 100.0)
    assert isinstance(stream.look(100.0), Place)
    once_more = stream.look(500.0)
    assert isinstance(once_more, Place)
    assert (once_more.anybody, once_more.seconds) == (True, 0.25)
    assert isinstance(stream.look(900.0), GiveUp), "once, however late"


def test_without_a_wait_it_is_tried_once() -> None:
    stream = resuming(ResumePolicy(wait_s=0.0))
    broken(stream, 5, 100.0)
    assert isinstance(stream.look(100.0), Place)
    assert isinstance(stream.look(100.0), GiveUp)


def test_tokens_renew_the_wait_and_clear_who_failed() -> None:
    stream = resuming()
    broken(stream, 5, 100.0)
    broken(stream, 5, 105.0, runner_id="r2")
    assert stream.failed == {"r1", "r2"}
    assert isinstance(stream.look(109.5), Place)
    assert isinstance(stream.look(110.0), GiveUp)
    broken(stream, 6, 112.0, runner_id="r3")
    assert stream.failed == {"r3"}
    assert isinstance(stream.look(121.9), Place)


def test_who_finds_every_place_taken_waits_for_one() -> None:
    full = errors.OverloadedError("the queue is full", retry_after_s=1.0)
    stream = resuming()
    assert broken(stream, 5, 100.0) is None
    asked, now = 0, 100.0
    while not isinstance(step := stream.look(now), GiveUp):
        assert isinstance(step, Place)
        if step.anybody:
            asked += 1
            if (step := broken(stream, 5, now, full)) is not None:
                break
        else:
            now += max(step.seconds, 0.001)
    assert now == pytest.approx(110.0, abs=2.1), "as long as anybody waits for a runner"
    assert 5 <= asked <= POLICY.most, "not as often as it can"
    assert step.error.metadata["cause"] == full.reason


def test_a_full_runner_does_not_use_up_the_attempts_of_those_that_fail() -> None:
    stream = resuming()
    broken(stream, 5, 100.0)
    for number in range(5):
        assert broken(stream, 5, 100.5 + number, errors.OverloadedError("full", retry_after_s=1.0)) is None
    assert broken(stream, 5, 106.0) is None
    assert broken(stream, 5, 106.5) is None
    assert broken(stream, 5, 107.0) is not None


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 2), min_size=1, max_size=60))
def test_attempts_are_bounded(gains: list[int]) -> None:
    stream, delivered, fruitless = resuming(), 1, 0
    for number, gain in enumerate(gains, start=1):
        delivered += gain
        fruitless = 1 if gain or number == 1 else fruitless + 1
        may = stream.may_break(delivered)
        ended = broken(stream, delivered, float(number))
        assert may is (ended is None)
        assert (ended is None) is (fruitless <= POLICY.fruitless and number <= POLICY.most)
        if ended is not None:
            assert ended.error.metadata["delivered_tokens"] == str(delivered)
            return


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequestError("resume", "is wrong"),
        errors.UnsupportedFeatureError("no"),
        errors.DeadlineExceededError("late"),
        errors.InternalError("a defect"),
    ],
)
def test_what_no_other_runner_mends_is_told_as_it_is(error: ChorusError) -> None:
    ended = broken(resuming(), 4, 1.0, error)
    assert ended == GiveUp(error)
    assert error.metadata["delivered_tokens"] == "4"


def test_an_obstacle_ends_it_at_once() -> None:
    stream = resuming()
    ended = stream.broken(errors.EngineError("crashed"), "r1", delivered=3, obstacle="there are no token ids", now=1.0)
    assert ended is not None
    assert type(ended.error) is UnavailableError
    assert (
        ended.error.message
    ) == "crashed; the answer broke off after 3 tokens, and it cannot go on elsewhere: there are no token ids"
    assert ended.error.metadata["cause"] == "ENGINE_FAILED"


def test_the_first_resume_is_free_and_the_others_wait_for_the_budget() -> None:
    budget = RetryBudget(ratio=0.0, floor_per_s=1.0, reserve=1.0)
    assert budget.spend(0.0)
    stream = resuming(budget=budget)
    broken(stream, 5, 0.0)
    assert isinstance(stream.look(0.0), Place)
    broken(stream, 6, 0.1)
    assert isinstance(stream.look(0.1), Hold)
    assert isinstance(stream.look(1.1), Place)
    assert isinstance(stream.look(1.2), Place)  # it was paid once for this attempt
    assert not budget.spend(1.2)


def test_a_budget_that_stays_empty_ends_it_after_the_wait() -> None:
    stream = resuming(budget=empty())
    broken(stream, 5, 0.0)
    broken(stream, 6, 1.0)
    assert isinstance(stream.look(10.9), Hold)
    assert isinstance(stream.look(11.0), GiveUp)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.tuples(st.sampled_from(["look", "break", "gain"]), st.floats(0.0, 6.0)), max_size=80))
def test_looks_come_to_an_end_and_never_far_apart(steps: list[tuple[str, float]]) -> None:
    stream, now, delivered = resuming(), 0.0, 1
    assert broken(stream, delivered, now) is None
    since = now
    for what, seconds in steps:
        now += seconds
        if what != "look":
            gained = what == "gain"
            delivered += gained
            since = now if gained else since
            if broken(stream, delivered, now) is not None:
                return
        step = stream.look(now)
        if isinstance(step, GiveUp):
            assert now - since >= POLICY.wait_s
            return
        assert 0.0 <= step.seconds <= 0.25
