"""When a step of an engine is held to hang, and when a process that lives is held to be stopped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import ConfigError
from chorus.core.resilience.silence import ProbePolicy, Silence
from chorus.core.resilience.stuck import Patience, Step, StepTimes, Stuck, StuckWatch

PATIENCE = Patience(floor_s=30.0, factor=20.0)


def step(began: float = 0.0, expected_s: float | None = 0.01, tokens: int = 4) -> Step:
    return Step(tokens, began, expected_s)


def looks(watch: StuckWatch, under_way: Step | None, *times: float) -> list[Stuck | None]:
    return [watch.look(under_way, now) for now in times]


def every_second(first: int, last: int) -> list[float]:
    return [float(now) for now in range(first, last + 1)]


# --- steps ----------------------------------------------------------------------------------------------------------


def test_a_short_step_that_takes_longer_than_the_floor_hangs() -> None:
    found = looks(StuckWatch(PATIENCE), step(), *every_second(0, 31))
    assert found[:-1] == [None] * 31
    assert found[-1] == Stuck(tokens=4, seconds=31.0, allowed_s=30.0)


def test_a_step_that_is_long_by_nature_has_a_multiple_of_what_such_steps_take() -> None:
    found = looks(StuckWatch(PATIENCE), step(expected_s=10.0), *every_second(0, 201))
    assert [place for place, stuck in enumerate(found) if stuck] == [201]


def test_the_first_step_of_all_has_longest() -> None:
    found = looks(StuckWatch(PATIENCE), step(expected_s=None), *every_second(0, 601))
    assert [place for place, stuck in enumerate(found) if stuck] == [601]


def test_between_two_steps_nothing_hangs() -> None:
    assert looks(StuckWatch(PATIENCE), None, *every_second(0, 1000)) == [None] * 1001


@pytest.mark.parametrize("away_s", [6.0, 3600.0, 1e6])
def test_who_looks_too_late_begins_anew(away_s: float) -> None:
    watch, under_way = StuckWatch(PATIENCE), step()
    assert looks(watch, under_way, *every_second(0, 29)) == [None] * 30
    back = 29.0 + away_s
    assert watch.look(under_way, back) is None
    assert looks(watch, under_way, *(back + second for second in range(1, 31))) == [None] * 30
    assert watch.look(under_way, back + 31) is not None


def test_what_was_measured_bounds_other_sizes() -> None:
    times = StepTimes()
    assert times.expected_s(1) is None
    times.took(1, 0.02)
    assert times.expected_s(1) == 0.02
    assert times.expected_s(256) == pytest.approx(0.02 * 256), "no token can cost more than one alone"
    times.took(511, 1.0)
    assert times.expected_s(300) == 1.0
    assert times.expected_s(128) == 1.0, "no step takes longer than a bigger one"
    assert times.expected_s(8) == pytest.approx(0.16)


@given(
    measured=st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-4, 100)), min_size=1),
    tokens=st.integers(1, 4096),
)
def test_more_tokens_are_never_expected_to_take_less(measured: list[tuple[int, float]], tokens: int) -> None:
    times = StepTimes()
    for count, seconds in measured:
        times.took(count, seconds)
    expected, of_more = times.expected_s(tokens), times.expected_s(2 * tokens)
    assert expected is not None
    assert of_more is not None
    assert 0 < expected <= of_more


# --- processes ------------------------------------------------------------------------------------------------------

POLICY = ProbePolicy(silent_s=10.0, interval_s=1.0, timeout_s=2.0, misses_at_least=3)


def test_a_silent_process_is_given_up_after_so_long() -> None:
    silence = Silence(POLICY, 0.0)
    silence.answered(1.0)
    assert [silence.missed(now) for now in (4.0, 7.0, 10.0)] == [None] * 3
    assert silence.missed(13.0) == 12.0


def test_one_answer_is_enough() -> None:
    silence = Silence(POLICY, 0.0)
    for now in (3.0, 6.0, 9.0):
        silence.missed(now)
    silence.answered(9.5)
    assert [silence.missed(now) for now in (12.0, 15.0, 18.0)] == [None] * 3


def test_two_misses_are_no_silence_however_long_they_took() -> None:
    silence = Silence(ProbePolicy(silent_s=3.0, misses_at_least=3), 0.0)
    assert [silence.missed(now) for now in (5.0, 10.0)] == [None, None]
    assert silence.missed(15.0) == 15.0


@pytest.mark.parametrize("away_s", [10.0, 86_400.0])
def test_who_asks_and_stood_still_himself_counts_anew(away_s: float) -> None:
    silence = Silence(POLICY, 0.0)
    for now in (3.0, 6.0, 9.0):
        assert silence.missed(now) is None
    back = 9.0 + away_s
    assert silence.missed(back) is None
    assert [silence.missed(back + later) for later in (3.0, 6.0, 9.0)] == [None] * 3
    assert silence.missed(back + 12.0) == 12.0


def test_a_starved_machine_is_no_silence_of_its_processes() -> None:
    silence = Silence(POLICY, 0.0)
    assert [silence.missed(3.0 * count, late_s=0.3) for count in range(1, 20)] == [None] * 19


def test_what_was_missed_while_nobody_was_late_counts_before_and_after_it() -> None:
    silence = Silence(POLICY, 0.0)
    assert [silence.missed(now, late_s=0.2) for now in (3.0, 6.0)] == [None, None]
    assert [silence.missed(now, late_s=1.0) for now in (9.0, 12.0, 15.0)] == [None] * 3
    assert silence.missed(18.0) is None
    assert silence.missed(21.0) == 21.0, "12 s of them count"


def test_one_that_hangs_on_a_machine_that_is_always_starved_is_given_up_in_the_end() -> None:
    silence = Silence(POLICY, 0.0)
    found = [silence.missed(3.0 * count, late_s=1.0) for count in range(1, 23)]
    assert found == [None] * 21 + [66.0]


@given(st.lists(st.tuples(st.floats(0.1, 6.0), st.one_of(st.just(0.0), st.floats(0.0, 3.0)), st.booleans())))
def test_only_time_without_lateness_or_very_long_silence_is_held_against_a_process(
    outcomes: list[tuple[float, float, bool]],
) -> None:
    silence, now = Silence(POLICY, 0.0), 0.0
    heard = counted = 0.0
    for seconds, late_s, answers in outcomes:
        now += seconds
        if answers:
            silence.answered(now)
            heard, counted = now, 0.0
            continue
        counted += 0.0 if late_s > POLICY.late_s else seconds
        found = silence.missed(now, late_s=late_s)
        if found is not None:
            assert found == pytest.approx(now - heard)
            assert counted >= POLICY.silent_s - 1e-6 or found >= POLICY.excused_for * POLICY.silent_s


def test_nobody_is_given_up_where_that_is_switched_off() -> None:
    silence = Silence(ProbePolicy(silent_s=0), 0.0)
    assert [silence.missed(3.0 * count, late_s=count % 2) for count in range(1, 100)] == [None] * 99


@pytest.mark.parametrize(
    "wrong", [{"silent_s": -1}, {"interval_s": 0}, {"timeout_s": 0}, {"misses_at_least": 0}, {"late_s": 0}]
)
def test_policies_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ProbePolicy(**wrong)  # type: ignore[arg-type]
