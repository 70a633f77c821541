"""What a load report can't know of."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chorus.core.placement.in_flight import MAX_STEPS, REPORT_LAG_S, InFlight


def test_a_report_takes_over_what_was_before_it() -> None:
    counts = InFlight()
    counts.began("r", 0.0)
    counts.began("r", 1.0)
    counts.began("r", 1.5)
    assert counts.unreported == {"r": 3}
    counts.reported("r", 1.5)
    assert counts.unreported == {"r": 1}
    assert counts.running("r") == 3
    counts.ended("r", 1.6)
    counts.ended("r", 1.6)
    assert counts.unreported == {"r": -1}
    counts.reported("r", 5.0)
    assert counts.unreported == {}
    assert counts.running("r") == 1


def test_who_left_is_forgotten_and_its_requests_still_end() -> None:
    counts = InFlight()
    counts.began("r", 0.0)
    counts.left("r")
    assert counts.unreported == {}
    counts.ended("r", 1.0)
    assert counts.running("r") == 0
    counts.reported("r", 9.0)
    assert counts.unreported == {}


steps = st.lists(st.tuples(st.sampled_from(["began", "ended", "reported"]), st.floats(0, 0.3)), max_size=2 * MAX_STEPS)


@given(steps)
def test_unreported_is_what_happened_since_the_last_report_less_its_lag(taken: list[tuple[str, float]]) -> None:
    counts, now, running = InFlight(), 0.0, 0
    history: list[tuple[float, int]] = []
    horizon = -1.0
    for kind, gap in taken:
        now += gap
        if kind == "reported":
            counts.reported("r", now)
            horizon = now - REPORT_LAG_S
        elif kind == "began":
            counts.began("r", now)
            history.append((now, 1))
            running += 1
        elif running:
            counts.ended("r", now)
            history.append((now, -1))
            running -= 1
        assert counts.running("r") == running
        assert counts.unreported.get("r", 0) == sum(change for at, change in history if at > horizon)


def test_without_reports_memory_is_bounded_and_the_count_right() -> None:
    counts = InFlight()
    for number in range(10 * MAX_STEPS):
        counts.began("r", float(number))
    assert counts.unreported["r"] == 10 * MAX_STEPS
    assert len(counts._steps["r"]) <= MAX_STEPS
    counts.reported("r", 1e9)
    assert counts.unreported == {}
