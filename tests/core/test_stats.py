"""Figures of requests: sketches against sorted lists, the sliding window against all that happened."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.events import (
    AttemptFailed,
    AttemptResumed,
    Detail,
    Event,
    EventKind,
    Outcome,
    RequestAdmitted,
    RequestFinished,
    RequestRefused,
    Subject,
)
from chorus.core.events.records import KIND_OF
from chorus.core.events.sketch import GROWTH, LEAST, MOST, Sketch
from chorus.core.events.stats import MAX_MODELS, OTHERS, Figures, Report, Stats, busiest
from chorus.core.fleet.records import EngineKind
from chorus.core.generation import Priority
from chorus.core.placement import Work

numbers = st.floats(0, 1e9)


def sketch_of(values: list[float]) -> Sketch:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    return sketch


@given(st.lists(numbers, min_size=1), st.floats(0, 1))
def test_a_quantile_is_right_within_half_a_bucket(values: list[float], share: float) -> None:
    sketch = sketch_of(values)
    exact = sorted(values)[math.floor(share * (len(values) - 1))]
    error = (GROWTH - 1) / (GROWTH + 1) + 1e-9
    assert sketch.quantile(share) == pytest.approx(0.0 if exact < LEAST else exact, rel=error)
    assert sketch.count == len(values)
    assert sketch.mean == pytest.approx(sum(value for value in values if value >= LEAST) / len(values))


@given(st.lists(numbers), st.lists(numbers))
def test_merging_is_as_if_all_had_come_to_one(some: list[float], others: list[float]) -> None:
    merged = sketch_of(some)
    merged.merge(sketch_of(others))
    whole = sketch_of(some + others)
    assert (merged.counts, merged.zeros) == (whole.counts, whole.zeros)
    assert merged.sum == pytest.approx(whole.sum)


def test_what_is_no_such_number_does_no_harm() -> None:
    sketch = sketch_of([math.nan, -1.0, 0.0, math.inf, 1e300])
    assert (sketch.zeros, sketch.count) == (3, 5)
    assert sketch.quantile(1.0) == pytest.approx(MOST, rel=GROWTH - 1)
    assert Sketch().quantile(0.5) == Sketch().mean == 0.0


# --- the window -----------------------------------------------------------------------------------------------------

details: st.SearchStrategy[Detail] = st.one_of(
    st.builds(
        RequestFinished,
        st.just(Work.GENERATE),
        st.sampled_from(Outcome),
        reason=st.sampled_from(["", "UNAVAILABLE"]),
        engine=st.sampled_from(EngineKind),
        queue_s=st.sampled_from([0.0, 0.5]),
        first_token_s=st.none() | st.just(1.0),
        output_tokens=st.integers(0, 9),
        tokens_per_second=st.sampled_from([0.0, 50.0]),
    ),
    st.builds(RequestRefused, st.just(Work.GENERATE), st.sampled_from(["OVERLOADED", "UNKNOWN_MODEL"]), st.just("")),
    st.builds(AttemptFailed, st.just(1), st.just("ENGINE_FAILED"), st.just(""), st.booleans()),
    st.builds(AttemptResumed, st.just(2), st.just("UNAVAILABLE"), st.just(0.1), st.just(3)),
    st.builds(RequestAdmitted, st.just(Work.GENERATE), st.just(Priority.INTERACTIVE), st.just(0.0)),
)
happened = st.tuples(st.floats(0, 40), st.sampled_from(["", "m", "n"]), st.sampled_from(["", "a", "b"]), details)
WINDOW_S, SLICE_S = 60.0, 10.0


def summary(figures: Figures) -> tuple[object, ...]:
    return (
        figures.completed,
        figures.cancelled,
        dict(figures.failed),
        dict(figures.refused),
        dict(figures.failed_attempts),
        figures.resumed,
        dict(figures.engines),
        figures.output_tokens,
        figures.queue.count,
        figures.first_token.count,
        figures.tokens_per_second.count,
    )


@given(st.lists(happened, max_size=30))
def test_the_window_holds_what_happened_in_it_within_a_slice(
    steps: list[tuple[float, str, str, Detail]],
) -> None:
    stats = Stats(0.0, window_s=WINDOW_S, slice_s=SLICE_S)
    now, seen = 0.0, []
    for wait_s, model, node_id, detail in steps:
        now += wait_s
        event = Event(0, 0.0, KIND_OF[type(detail)], Subject(model=model, node_id=node_id), detail)
        stats.take(event, now)
        seen.append((now, event))
    report = stats.report(now)
    assert report.window_s == pytest.approx(min(now, WINDOW_S))
    # What came within a slice of the window's edge may be counted or not, so only what is well within, or well out,
    # is told for certain: the counts lie between the two.
    certain = [event for at, event in seen if at > now - WINDOW_S + SLICE_S]
    possible = [event for at, event in seen if at > now - WINDOW_S]
    for found, pick in (
        ({"": report.total}, lambda _: ""),
        (report.models, lambda event: event.subject.model),
        (report.nodes, lambda event: event.subject.node_id),
    ):
        for name, figures in found.items():
            least, most = Figures(), Figures()
            for events, into in ((certain, least), (possible, most)):
                for event in events:
                    if pick(event) == name:
                        into.take(event)
            assert least.requests <= figures.requests <= most.requests
            assert least.resumed <= figures.resumed <= most.resumed
            assert least.output_tokens <= figures.output_tokens <= most.output_tokens
            if summary(least) == summary(most):
                assert summary(figures) == summary(most)


def test_names_that_callers_make_up_do_not_fill_the_memory() -> None:
    stats = Stats(0.0)
    for number in range(MAX_MODELS + 50):
        refused = RequestRefused(Work.GENERATE, "UNKNOWN_MODEL", "")
        stats.take(Event(0, 0.0, EventKind.REQUEST_REFUSED, Subject(model=f"m{number}"), refused), 0.0)
    report = stats.report(0.0)
    assert len(report.models) == MAX_MODELS + 1
    assert report.models[OTHERS].requests == 50
    assert report.total.requests == MAX_MODELS + 50


def test_reports_of_several_coordinators_add_up() -> None:
    rng = random.Random(1)
    whole, parts = Report(), [Report(window_s=5.0), Report(window_s=9.0)]
    for _ in range(200):
        detail = RequestFinished(Work.GENERATE, Outcome.COMPLETED, first_token_s=rng.random(), output_tokens=3)
        event = Event(0, 0.0, EventKind.REQUEST_FINISHED, Subject(), detail)
        for report in (whole, rng.choice(parts)):
            report.total.take(event)
            report.models.setdefault("m", Figures()).take(event)
    merged = Report()
    for part in parts:
        merged.merge(part)
    assert merged.window_s == 9.0
    assert summary(merged.total) == summary(whole.total)
    assert merged.models["m"].first_token.quantile(0.95) == whole.models["m"].first_token.quantile(0.95)
    assert merged.total.local_share == 1.0
    assert Figures().local_share is None


def test_the_busiest_are_told_by_name() -> None:
    figures = {name: Figures(completed=count) for name, count in (("a", 1), ("b", 3), ("c", 2))}
    assert [name for name, _ in busiest(figures, 2)] == ["b", "c"]
