"""What is asked for again and again at a time, or after something else, is foreseen; what came by chance is not."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.placement import Patterns
from chorus.core.placement.patterns import DAY_S, MAX_MODELS, PAUSE_S, SLOT_S, WEEK_S

LOAD = {"a": 20.0, "b": 20.0}
LEAST = 0.6
NINE = 20_000 * DAY_S + 9 * 3600.0


def soon(patterns: Patterns, now: float) -> set[str]:
    return set(patterns.likely(now, LOAD, LEAST))


@pytest.mark.parametrize("cycle", [DAY_S, WEEK_S])
@given(jitter=st.lists(st.floats(-300, 300), min_size=3, max_size=3))
@settings(max_examples=20)
def test_twice_at_the_same_time_is_a_pattern_and_once_is_none(cycle: float, jitter: list[float]) -> None:
    patterns = Patterns()
    for number, off in enumerate(jitter[:2]):
        assert soon(patterns, NINE + number * cycle - 15.0) == set()
        patterns.asked("a", NINE + number * cycle + off)
    third = NINE + 2 * cycle
    assert soon(patterns, third + jitter[2] - 15.0) == {"a"}  # while it takes 20 s to load
    assert soon(patterns, third - 4 * SLOT_S) == set()
    patterns.asked("a", third)
    assert soon(patterns, third + 1.0) == set()  # it has come
    # A pattern that is over is forgotten.
    assert soon(patterns, third + 5 * cycle) == set()


@given(st.integers(0, 1000))
@settings(max_examples=10)
def test_what_comes_by_chance_is_foreseen_hardly_ever(seed: int) -> None:
    patterns, rng = Patterns(), Random(seed)
    foreseen = 0
    for day in range(30):
        at = NINE + day * DAY_S + rng.uniform(0, DAY_S)
        foreseen += bool(soon(patterns, at))
        patterns.asked("a", at)
    assert foreseen <= 2


def test_what_follows_another_model_is_foreseen_from_the_fourth_time_on() -> None:
    patterns = Patterns()
    for number in range(6):
        at = NINE + number * (DAY_S + 7 * SLOT_S)  # at another time each day
        patterns.asked("a", at)
        patterns.asked("a", at + 5.0)  # the same use goes on
        assert soon(patterns, at + 5.0) == ({"b"} if number >= 3 else set())
        assert soon(patterns, at + PAUSE_S + 1.0) == set()
        patterns.asked("b", at + 60.0)
        assert soon(patterns, at + 61.0) == set()
    for number in range(10, 14):  # it follows no more
        patterns.asked("a", NINE + number * (DAY_S + 7 * SLOT_S))
    assert soon(patterns, NINE + 13 * (DAY_S + 7 * SLOT_S) + 5.0) == set()


def test_names_that_callers_make_up_are_bounded() -> None:
    patterns = Patterns()
    for number in range(3 * MAX_MODELS):
        patterns.asked(f"m{number}", NINE + number * 1000.0)
    assert len(patterns._models) == MAX_MODELS


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 2 * DAY_S) | st.floats(0.0, 2 * PAUSE_S)), max_size=40),
    st.floats(2 * PAUSE_S, 8 * DAY_S),
)
@settings(max_examples=60)
def test_what_is_remembered_over_a_restart_foresees_the_same(asked: list[tuple[str, float]], later: float) -> None:
    patterns, now = Patterns(), NINE
    for model, pause in asked:
        now += pause
        patterns.asked(model, now)
    again = Patterns()
    again.recall(patterns.remembered(now))
    at = now + later
    for least in (0.1, 0.6):
        assert again.likely(at, LOAD, least) == pytest.approx(patterns.likely(at, LOAD, least))
    again.asked("a", at)
    patterns.asked("a", at)
    assert again.remembered(at) == patterns.remembered(at)


def test_what_has_faded_is_not_remembered() -> None:
    patterns = Patterns()
    for number in range(3):
        patterns.asked("a", NINE + number * DAY_S)
    (pattern,) = patterns.remembered(NINE + 3 * DAY_S)
    assert {cycle for cycle, *_ in pattern.slots} == {DAY_S, WEEK_S}
    (pattern,) = patterns.remembered(NINE + 60 * DAY_S)
    assert {cycle for cycle, *_ in pattern.slots} == {WEEK_S}
