"""Recent failures as a cost: never cheap after a failure, never expensive for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import (
    CancelledError,
    ChorusError,
    DrainingError,
    EngineError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
)
from chorus.core.resilience.failures import Failures, blames_runner

steps = st.lists(st.tuples(st.sampled_from(["failed", "succeeded"]), st.floats(0, 30)), max_size=40)


@given(steps)
def test_it_costs_after_a_failure_and_is_forgiven_in_time(history: list[tuple[str, float]]) -> None:
    failures, now, last = Failures(), 100.0, ""
    for what, pause_s in history:
        now += pause_s
        getattr(failures, what)("r", 1, now)
        last = what
        assert 0 <= failures.penalties(now).get("r", 0.0) <= 60.0
    if last == "failed":
        assert failures.penalties(now)["r"] >= 20.0
        assert failures.penalties(now + 6.0)["r"] == pytest.approx(failures.penalties(now)["r"] / 2)
    # However often it failed: within a minute it costs less than a short request, so it is asked again.
    assert failures.penalties(now + 60.0).get("r", 0.0) < 0.1
    assert failures.penalties(now + 90.0) == {}


@given(steps)
def test_a_success_never_makes_it_dearer_nor_a_failure_cheaper(history: list[tuple[str, float]]) -> None:
    failures, now = Failures(), 0.0
    for what, pause_s in history:
        now += pause_s
        before = failures.penalties(now).get("r", 0.0)
        getattr(failures, what)("r", 1, now)
        after = failures.penalties(now).get("r", 0.0)
        assert after >= before if what == "failed" else after <= before


def test_another_process_starts_afresh_and_who_left_is_forgotten() -> None:
    failures = Failures()
    failures.failed("r", 1, 0.0)
    failures.failed("r", 1, 0.0)
    failures.failed("r", 2, 0.0)
    assert failures.penalties(0.0) == {"r": 20.0}
    failures.succeeded("r", 3, 0.0)
    assert failures.penalties(0.0) == {}
    failures.failed("r", 3, 0.0)
    failures.forget("r")
    assert failures.penalties(0.0) == {}


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (UnavailableError("x"), True),
        (EngineError("x"), True),
        (InternalError("x"), True),
        (DrainingError("x"), False),
        (OverloadedError("x"), False),
        (CancelledError("x"), False),
        (UnknownModelError("x"), False),
        (InvalidRequestError("field", "x"), False),
    ],
)
def test_what_speaks_against_a_runner(error: ChorusError, blamed: bool) -> None:
    assert blames_runner(error) is blamed
