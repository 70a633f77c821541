"""Whether another runner is tried, and which error a caller gets in the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core import errors
from chorus.core.errors import ChorusError
from chorus.core.resilience.retries import (
    LOST,
    Attempts,
    GiveUp,
    RetryBudget,
    TryAgain,
    may_go_better_elsewhere,
    most_telling,
)

ELSEWHERE: list[ChorusError] = [
    errors.UnavailableError("gone"),
    errors.DrainingError("leaving"),
    errors.EngineError("crashed"),
    errors.OverloadedError("full", retry_after_s=2.0),
    errors.UnknownModelError("unloaded"),
    errors.ModelFileError("damaged"),
    errors.OutOfMemoryError("too big"),
    errors.PromptTooLongError(5000, 4096, model="m"),
]
NOWHERE: list[ChorusError] = [
    errors.InvalidRequestError("model", "is wrong"),
    errors.MalformedMessageError("what"),
    errors.UnsupportedFeatureError("no"),
    errors.PermissionDeniedError("no"),
    errors.UnauthenticatedError("who"),
    errors.DeadlineExceededError("late"),
    errors.CancelledError("gone"),
    errors.InternalError("bug"),
]


def attempts(max_attempts: int = 3, budget: RetryBudget | None = None) -> Attempts:
    return Attempts(max_attempts, budget or RetryBudget())


@pytest.mark.parametrize("error", ELSEWHERE, ids=lambda error: error.reason)
def test_a_runners_trouble_is_tried_elsewhere_before_the_first_token_only(error: ChorusError) -> None:
    trial = attempts()
    assert trial.begin("r1") == 1
    assert isinstance(trial.failed(error, delivered=False, now=0.0), TryAgain)
    assert trial.begin("r2") == 2
    assert trial.failed(error, delivered=True, now=0.0) == GiveUp(error)
    assert trial.tried == {"r1", "r2"}


@pytest.mark.parametrize("error", NOWHERE, ids=lambda error: error.reason)
def test_the_requests_own_fault_is_passed_on_at_once(error: ChorusError) -> None:
    assert not may_go_better_elsewhere(error)
    trial = attempts()
    trial.begin("r1")
    assert trial.failed(error, delivered=False, now=0.0) == GiveUp(error)


def test_attempts_are_bounded() -> None:
    trial = attempts(max_attempts=2)
    trial.begin("r1")
    assert trial.failed(errors.UnavailableError("one"), delivered=False, now=0.0) == TryAgain()
    trial.begin("r2")
    decision = trial.failed(errors.UnavailableError("two"), delivered=False, now=0.0)
    assert isinstance(decision, GiveUp)
    assert decision.error.message == "two"


def test_a_prompt_that_was_too_long_asks_for_what_it_needs_and_more_than_there_was() -> None:
    for tokens, context, needed in ((5000, 4096, 5001), (4000, 4096, 4097)):
        trial = attempts()
        trial.begin("r1")
        error = errors.PromptTooLongError(tokens, context, model="m")
        assert trial.failed(error, delivered=False, now=0.0) == TryAgain(needed)


def test_nobody_left_tells_of_the_attempts_rather_than_of_the_search() -> None:
    trial = attempts()
    nobody = errors.RunnersUnavailableError("all were tried")
    assert trial.refused(nobody) is nobody
    trial.begin("r1")
    crash = errors.EngineError("crashed")
    trial.failed(crash, delivered=False, now=0.0)
    assert trial.refused(nobody) is crash
    full = errors.OverloadedError("the rest is full", retry_after_s=1.0)
    assert trial.refused(full) is full


def test_a_stale_directory_tells_less_than_the_search() -> None:
    trial = attempts()
    trial.begin("r1")
    trial.failed(errors.UnknownModelError("not here"), delivered=False, now=0.0)
    nobody = errors.RunnersUnavailableError("r1 was tried already")
    assert trial.refused(nobody) is nobody


def test_the_longest_context_and_the_shortest_wait_tell_most() -> None:
    short, long = (errors.PromptTooLongError(9000, context, model="m") for context in (2048, 8192))
    assert most_telling([long, short, errors.EngineError("x")]) is long
    soon, late = (errors.OverloadedError("full", retry_after_s=wait) for wait in (1.0, 9.0))
    assert most_telling([errors.EngineError("x"), soon, late]) is soon


@given(st.lists(st.sampled_from(ELSEWHERE), min_size=1))
def test_what_is_told_is_one_of_what_happened(happened: list[ChorusError]) -> None:
    assert most_telling(happened) in happened


@given(st.lists(st.tuples(st.sampled_from(["request", "retry"]), st.floats(0, 0.5)), max_size=300))
def test_retries_never_outrun_their_budget(steps: list[tuple[str, float]]) -> None:
    budget = RetryBudget(ratio=0.25, floor_per_s=2.0, reserve=5.0)
    now, earned, spent = 0.0, 5.0, 0
    for kind, gap in steps:
        now += gap
        if kind == "request":
            budget.earn(now)
            earned += 0.25
        elif budget.spend(now):
            spent += 1
        assert spent <= earned + 2.0 * now + 1e-6


def test_a_spent_budget_ends_retries_and_time_brings_them_back() -> None:
    budget = RetryBudget(ratio=0.0, floor_per_s=1.0, reserve=2.0)
    outcomes = []
    for _ in range(4):
        trial = attempts(budget=budget)
        trial.begin("r1")
        outcomes.append(type(trial.failed(errors.UnavailableError("x"), delivered=False, now=5.0)))
    assert outcomes == [TryAgain, TryAgain, GiveUp, GiveUp]
    assert budget.spend(6.0)
    assert not budget.spend(6.0)


def test_a_clock_that_stands_still_or_goes_back_earns_nothing() -> None:
    budget = RetryBudget(ratio=0.0, floor_per_s=1.0, reserve=1.0)
    assert budget.spend(10.0)
    assert not budget.spend(10.0)
    assert not budget.spend(3.0)


def test_who_had_a_runner_that_was_lost_waits_a_while_and_who_had_none_does_not() -> None:
    nobody = errors.RunnersUnavailableError("nobody can be asked now")
    attempts = Attempts(3, RetryBudget())
    assert not attempts.may_wait(nobody, 100.0, 10.0)
    attempts.begin("r1")
    attempts.failed(errors.UnavailableError("its own word"), delivered=False, now=100.0)
    assert not attempts.may_wait(nobody, 100.0, 10.0)
    attempts.failed(errors.UnavailableError("gone", metadata={LOST: "true"}), delivered=False, now=101.0)
    assert not attempts.may_wait(errors.UnknownModelError("no such model"), 101.0, 10.0)
    assert attempts.may_wait(nobody, 110.9, 10.0)
    assert attempts.tried == set()
    assert not attempts.may_wait(nobody, 111.0, 10.0)


def test_who_failed_the_caller_already_comes_last_and_is_asked_once_nobody_else_can_be() -> None:
    attempts = Attempts(3, RetryBudget(), avoided="r1")
    assert attempts.tried == {"r1"}
    attempts.begin("r2")
    assert attempts.avoids_no_more()
    assert attempts.tried == {"r2"}
    assert not attempts.avoids_no_more()
    assert not Attempts(3, RetryBudget()).avoids_no_more()
