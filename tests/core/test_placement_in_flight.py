"""What a load report can't know of."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from chorus.core.placement.in_flight import MAX_COMPANY, MAX_STEPS, PEAK_S, REPORT_LAG_S, SHARED_S, InFlight


def test_a_report_takes_over_what_was_before_it() -> None:
    counts = InFlight()
    counts.began("r", 0.0)
    counts.began("r", 1.0)
    counts.began("r", 1.5)
    assert counts.unreported == {"r": 3}
    counts.reported("r", 1.5, None)
    assert counts.unreported == {"r": 1}
    assert counts.running("r") == 3
    counts.ended("r", 1.6)
    counts.ended("r", 1.6)
    assert counts.unreported == {"r": -1}
    counts.reported("r", 5.0, None)
    assert counts.unreported == {}
    assert counts.running("r") == 1


def test_who_left_is_forgotten_and_its_requests_still_end() -> None:
    counts = InFlight()
    counts.began("r", 0.0)
    counts.left("r")
    assert counts.unreported == {}
    counts.ended("r", 1.0)
    assert counts.running("r") == 0
    assert counts.unreported == {}, "another of its name starts from nothing"
    counts.reported("r", 9.0, None)
    assert counts.unreported == {}


def test_a_runner_that_is_back_has_the_requests_that_went_on_meanwhile() -> None:
    counts = InFlight("me")
    for _ in range(3):
        counts.began("r", 0.0)
    counts.left("r")
    counts.ended("r", 1.0)
    counts.reported("r", 2.0, {"me": 2})
    assert counts.unreported == {}
    counts.began("r", 2.1)
    assert counts.unreported == {"r": 1}


steps = st.lists(st.tuples(st.sampled_from(["began", "ended", "reported"]), st.floats(0, 0.3)), max_size=2 * MAX_STEPS)


@given(steps)
def test_unreported_is_what_happened_since_the_last_report_less_its_lag(taken: list[tuple[str, float]]) -> None:
    counts, now, running = InFlight(), 0.0, 0
    history: list[tuple[float, int]] = []
    horizon = -1.0
    for kind, gap in taken:
        now += gap
        if kind == "reported":
            counts.reported("r", now, None)
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
    counts.reported("r", 1e9, None)
    assert counts.unreported == {}


WHO = ("me", "you", "them")
whose = st.dictionaries(st.sampled_from(WHO), st.integers(0, 9))
moves = st.tuples(st.sampled_from(["began", "ended", "left"]), st.sampled_from("rs"), st.none())
reports = st.tuples(st.just("reported"), st.sampled_from("rs"), whose)


@given(st.lists(moves | reports, max_size=60))
def test_where_a_report_says_whose_they_are_ours_are_known_exactly(
    taken: list[tuple[str, str, dict[str, int]]],
) -> None:
    counts, running = InFlight("me"), Counter[str]()
    told: dict[str, dict[str, int]] = {"r": {}, "s": {}}
    for runner_id in told:
        counts.reported(runner_id, 0.0, {})
    for now, (kind, runner_id, by_coordinator) in enumerate(taken):
        if kind == "reported":
            # More of ours than we have is somebody else's.
            told[runner_id] = by_coordinator | {"me": min(by_coordinator.get("me", 0), running[runner_id])}
            counts.reported(runner_id, now, told[runner_id])
        elif kind == "left":
            told[runner_id] = {}
            counts.left(runner_id)
            counts.reported(runner_id, now, {})  # another one of its name has come
        elif kind == "began":
            counts.began(runner_id, now)
            running[runner_id] += 1
        elif running[runner_id]:
            counts.ended(runner_id, now)
            running[runner_id] -= 1
        ours = sum(report.get("me", 0) for report in told.values())
        everybody = sum(sum(report.values()) for report in told.values())
        assert counts.company == min(MAX_COMPANY, (everybody + 1) / (ours + 1))
        for one, report in told.items():
            # What placement adds to the runner's own count: nobody is counted twice or left out.
            assert counts.unreported.get(one, 0) == running[one] - report.get("me", 0)


def test_a_coordinator_without_a_name_goes_by_what_is_older_than_the_report() -> None:
    counts = InFlight()
    counts.began("r", 0.0)
    counts.reported("r", 0.0, {"me": 5})
    assert (counts.unreported, counts.company) == ({"r": 1}, 1.0)
    counts.reported("r", 1.0, {"me": 5})
    assert counts.unreported == {}


def test_coordinators_with_one_name_do_not_take_each_other_s_requests_for_their_own() -> None:
    idle, busy = InFlight("both"), InFlight("both")
    for number in range(6):
        busy.began("r", 0.1 * number)
    idle.began("r", 0.5)
    for second in range(1, 300):
        for counts in (idle, busy):
            counts.reported("r", float(second), {"both": 7})
            # Whoever subtracted seven and added its own would take the other's for nothing.
            assert counts.unreported.get("r", 0) == 0
            assert counts.company == 1.0
    idle.began("r", 300.0)
    assert idle.unreported == {"r": 1}


def test_what_is_left_of_a_process_with_our_name_is_forgotten_when_it_has_ended() -> None:
    counts = InFlight("me")
    counts.reported("r", 0.0, {"me": 3})  # of the one before this one
    counts.began("r", 1.0)
    counts.reported("r", 1.5, {"me": 4, "you": 2})
    assert counts.company == 1.0
    counts.reported("r", 2.0 + SHARED_S, {"me": 1, "you": 2})
    assert (counts.unreported, counts.company) == ({}, 2.0)


def test_a_report_that_is_old_is_not_taken_for_somebody_else_s() -> None:
    counts = InFlight("me")
    for at in range(5):
        counts.began("r", float(at))
    for at in range(5):
        counts.ended("r", 10.0 + at)
        counts.reported("r", 10.0 + at + 0.9 * PEAK_S, {"me": 5, "you": 4})
        assert counts.company > 1.0
