"""When a second attempt is made: whose request it may be, and how late the first one must be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.generation import DeliveredChoice, GenerationRequest, Priority, TextPrompt, Tool
from chorus.core.resilience.hedging import (
    LEAST_S,
    LEAST_SAMPLES,
    WINDOW,
    FirstTokenTimes,
    HedgeMode,
    may_be_hedged,
)

REQUEST = GenerationRequest("m", TextPrompt("hi"))
LOOKS = Tool("look", "", {})
ACTS = Tool("pay", "", {}, acts=True)


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("mode", list(HedgeMode))
def test_who_may_be_hedged(mode: HedgeMode, allowed: bool) -> None:
    expected = mode is HedgeMode.ALWAYS or (mode is HedgeMode.ASKED and allowed)
    assert may_be_hedged(REQUEST, mode, allowed=allowed) is expected
    assert may_be_hedged(replace(REQUEST, tools=(LOOKS,)), mode, allowed=allowed) is expected
    for never in (
        replace(REQUEST, tools=(LOOKS, ACTS)),
        replace(REQUEST, priority=Priority.BATCH),
        replace(REQUEST, priority=Priority.BACKGROUND),
        replace(REQUEST, resume=(DeliveredChoice(0, (1,)),)),
    ):
        assert not may_be_hedged(never, mode, allowed=allowed)


@given(st.lists(st.floats(0.0, 10.0), max_size=2 * WINDOW))
def test_late_is_later_than_nineteen_of_twenty_of_the_last_ones(times: list[float]) -> None:
    known = FirstTokenTimes()
    for seconds in times:
        known.note("m", 10, seconds)
    late = known.late_after("m", 10)
    last = times[-WINDOW:]
    if len(last) < LEAST_SAMPLES:
        assert late is None
        return
    assert late is not None
    later = sum(seconds > late for seconds in last)
    assert later <= 0.05 * len(last)
    if late > LEAST_S:
        assert late in last
        assert sum(seconds >= late for seconds in last) >= 0.05 * len(last) - 1e-9


def test_models_and_lengths_of_prompts_are_told_apart() -> None:
    known = FirstTokenTimes()
    for _ in range(LEAST_SAMPLES):
        known.note("m", 100, 1.0)
        known.note("m", 10_000, 9.0)
    assert known.late_after("m", 80) == 1.0
    assert known.late_after("m", 12_000) == 9.0
    assert known.late_after("m", 0) is None
    assert known.late_after("other", 100) is None


def test_what_callers_make_up_is_bounded() -> None:
    known = FirstTokenTimes()
    for number in range(1000):
        known.note(f"m{number}", 1, 1.0)
    assert len(known._windows) <= 512
