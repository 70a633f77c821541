"""Intervals and tests against known values and properties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.errors import InvalidRequestError
from chorus.eval.statistics import (
    binomial_below,
    calibration_error,
    clopper_pearson,
    holm,
    mcnemar,
    not_worse,
    paired_difference,
)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        (0, 10, 0.0, 1 - 0.025**0.1),
        (10, 10, 0.025**0.1, 1.0),
        (5, 10, 0.1870860, 0.8129140),  # a table's
        (1, 1000, 1 - 0.975**0.001, 0.0055589),
    ],
)
def test_exact_intervals(hits: int, count: int, low: float, high: float) -> None:
    interval = clopper_pearson(hits, count)
    assert interval.low == pytest.approx(low, abs=1e-6)
    assert interval.high == pytest.approx(high, abs=1e-6)


@given(st.integers(1, 300).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
@settings(max_examples=40)
def test_an_exact_interval_is_where_the_tails_are_a_fortieth(case: tuple[int, int]) -> None:
    hits, count = case
    interval = clopper_pearson(hits, count)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    if hits < count:
        assert binomial_below(hits, count, interval.high) == pytest.approx(0.025, abs=1e-6)
    if hits:
        assert 1 - binomial_below(hits - 1, count, interval.low) == pytest.approx(0.025, abs=1e-6)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequestError):
        clopper_pearson(0, 0)


def test_paired_differences_cancel_what_items_share() -> None:
    theirs = [float(index % 3 == 0) for index in range(600)]
    same = paired_difference(theirs, theirs)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    ours = [1.0 if index % 10 == 1 else score for index, score in enumerate(theirs)]
    gain = paired_difference(ours, theirs)
    assert gain.low > 0
    # the normal interval of the same differences
    spread = (gain.mean * (1 - gain.mean) / 600) ** 0.5
    assert gain.low == pytest.approx(gain.mean - 1.96 * spread, abs=0.005)
    assert gain.high == pytest.approx(gain.mean + 1.96 * spread, abs=0.005)


def test_strata_keep_their_sizes() -> None:
    """Where all of the difference is between strata, drawing within them leaves no doubt."""
    ours, theirs = [1.0] * 50 + [0.0] * 50, [0.0] * 50 + [0.0] * 50
    interval = paired_difference(ours, theirs, strata=["a"] * 50 + ["b"] * 50)
    assert (interval.low, interval.mean, interval.high) == (0.5, 0.5, 0.5)
    with pytest.raises(InvalidRequestError):
        paired_difference(ours, theirs[1:])


def test_mcnemar_is_a_sign_test() -> None:
    ours, theirs = [True] * 10 + [False] * 2 + [True] * 30, [False] * 10 + [True] * 2 + [True] * 30
    assert mcnemar(ours, theirs) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar([True], [True]) == 1.0


def test_holm() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=40)
def test_holm_keeps_the_order_and_never_lowers(p_values: dict[str, float]) -> None:
    adjusted = holm(p_values)
    assert all(p_values[name] <= value <= 1 for name, value in adjusted.items())
    order = sorted(p_values, key=lambda name: p_values[name])
    assert [adjusted[name] for name in order] == sorted(adjusted.values())


def test_not_worse_by_a_margin() -> None:
    right = [1.0, 0.0] * 300
    slightly = [0.0 if index in (0, 2) else score for index, score in enumerate(right)]
    far = [0.0 if index % 10 == 0 else score for index, score in enumerate(right)]
    ours = {"same": right, "slightly": slightly, "far": far}
    judged = not_worse(ours, dict.fromkeys(ours, right), margin=0.05)
    assert judged == {"same": True, "slightly": True, "far": False}


def test_calibration_error() -> None:
    assert calibration_error([0.75] * 4, [True, True, True, False]) == 0.0
    assert calibration_error([1.0] * 4, [True, True, False, False]) == 0.5
    assert calibration_error([0.9, 0.1], [False, True]) == pytest.approx(0.9)
    with pytest.raises(InvalidRequestError):
        calibration_error([], [])
