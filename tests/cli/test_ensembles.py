"""`chorus ask` with several models: what is taken from its options, and what is shown where."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence

import pytest
import typer

from chorus.cli.ensemble_options import ensemble_options
from chorus.cli.ensembles import EnsembleAnswer, show_verdict, stream_ensemble, stream_ensemble_events, summary
from chorus.client import EnsembleEvent, EnsembleGeneration, EnsembleRestarted, MemberEvent, MemberSpec, Verdict
from chorus.core.ensemble.records import Complexity, MemberOutcome, MemberState, Strategy
from chorus.core.generation import ChoiceOutcome, Finished, FinishReason, Timings, TokenDelta, Usage

FINISHED = Finished((ChoiceOutcome(0, FinishReason.END, 2),), Usage(3, 0, 2), Timings())
VERDICT = Verdict(
    Strategy.VOTE,
    agreement=0.5,
    coherence=0.75,
    confidence=0.625,
    members=(
        MemberOutcome("one", MemberState.ANSWERED, "m1", "node-1", "runner-1", ("two",), 0.5, took_s=1.0, tokens=2),
        MemberOutcome("two", MemberState.FAILED, "m2", reason="UNAVAILABLE"),
        MemberOutcome("three", MemberState.SKIPPED, "m3"),
    ),
    elapsed_s=1.25,
    complexity=Complexity.SIMPLE,
    answered_by="one",
)
EVENTS: list[EnsembleEvent] = [
    MemberEvent("one", TokenDelta(0, 0, (1,), "Pa\x1b[2J")),
    MemberEvent("two", TokenDelta(0, 0, (1,), "Lyon\nor")),
    MemberEvent("one", TokenDelta(0, 1, (2,), "ris")),
    MemberEvent("one", FINISHED),
    TokenDelta(0, 0, (1, 2), "Paris"),
    VERDICT,
    FINISHED,
]


def generation(events: Sequence[EnsembleEvent] = EVENTS) -> EnsembleGeneration:
    async def told() -> AsyncGenerator[EnsembleEvent]:
        for event in events:
            yield event

    return EnsembleGeneration(told())


async def test_a_pipe_gets_the_answer_and_members_line_by_line_go_elsewhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = await stream_ensemble(generation())
    show_verdict(VERDICT)
    shown = capsys.readouterr()
    assert shown.out == "Paris\n"
    lines = shown.err.splitlines()
    assert lines[:2] == ["two: Lyon", "one: Pa[2Jris"], "what a terminal would obey is not passed on"
    assert lines[2:] == [
        "one  m1  node-1  runner-1  answered  1.0 s  2  0.50  two",
        "two  m2  failed (UNAVAILABLE)  0.0 s",
        "three  m3  skipped",
        summary(VERDICT),
    ]
    assert whole.to_json()["verdict"]["failed"] == 1
    assert whole.to_json()["member_texts"]["two"] == "Lyon\nor"


def test_the_figures_are_one_line() -> None:
    assert summary(VERDICT) == (
        "vote, simple  2 asked: 1 answered, 1 failed, 1 skipped  agreement 50%  coherence 0.75  confidence 0.62  "
        "by one  1.2 s"
    )


async def test_events_are_lines_of_json_each_attributed(capsys: pytest.CaptureFixture[str]) -> None:
    await stream_ensemble_events(generation())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line.get("member_id"), line["event"]) for line in lines] == [
        ("one", "delta"),
        ("two", "delta"),
        ("one", "delta"),
        ("one", "finished"),
        ("", "delta"),
        (None, "verdict"),
        ("", "finished"),
    ]


def test_what_a_lost_coordinator_had_is_begun_anew() -> None:
    whole = EnsembleAnswer()
    for event in (EVENTS[0], EnsembleRestarted("c2"), EVENTS[2]):
        whole.take(event)
    assert whole.panels["one"].text == "ris"


def test_any_option_asks_for_an_ensemble() -> None:
    assert ensemble_options(None, None, None, "", 0, None, None, rounds=0, facet_set="") is None
    spec = ensemble_options(None, ["m*3", "a"], None, "", 0, None, None, rounds=0, facet_set="")
    assert spec is not None
    assert (spec.strategy, spec.members) == (Strategy.AUTO, (MemberSpec("m", 3), MemberSpec("a")))
    facets = ensemble_options(None, None, None, "", 0, None, None, rounds=0, facet_set="story")
    assert facets is not None
    assert facets.strategy is Strategy.FACETS
    with pytest.raises(typer.BadParameter, match=r"MODEL\*SAMPLES"):
        ensemble_options(Strategy.VOTE, ["m*many"], None, "", 0, None, None, rounds=0, facet_set="")
