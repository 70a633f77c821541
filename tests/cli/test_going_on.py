"""What a person is told when somebody else goes on with an answer: one line with who, why, and how long it took."""

from __future__ import annotations

import pytest

from chorus.cli.answering import going_on, standing_in
from chorus.cli.wrapping import WordWrap
from chorus.client import AttemptChanged, Substitution


def changed(runner_id: str = "runner-2", reason: str = "UNAVAILABLE", **more: object) -> AttemptChanged:
    return AttemptChanged(
        2, "n", runner_id, reason, 0.34, from_text=bool(more.get("text")), coordinator=str(more.get("at", ""))
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (changed(), "runner-1 was lost; runner-2 goes on where it stopped (0.3 s without a word)"),
        (
            changed(reason="DRAINING"),
            "runner-1 is leaving the mesh; runner-2 goes on where it stopped (0.3 s without a word)",
        ),
        (
            changed("runner-1", "ENGINE_FAILED"),
            "runner-1 had trouble with its engine, and goes on itself where it stopped (0.3 s without a word)",
        ),
        (
            changed(reason="OF_A_NEWER_RUNNER"),
            "runner-1 broke off; runner-2 goes on where it stopped (0.3 s without a word)",
        ),
        (
            changed(at="coordinator-2@10.0.0.7:7301"),
            "the coordinator was lost; the one at 10.0.0.7:7301 goes on where it stopped (0.3 s without a word)",
        ),
        (
            changed(text=True),
            "runner-1 was lost; runner-2 goes on where it stopped, from the text alone, so that a word may be repeated "
            "(0.3 s without a word)",
        ),
    ],
)
def test_it_reads_like_a_sentence(change: AttemptChanged, line: str) -> None:
    assert going_on(change, "runner-1") == line


def test_who_stands_in_is_named_with_the_reason() -> None:
    assert standing_in(Substitution("qwen", "llama", "UNKNOWN_MODEL")) == (
        "llama answers in place of qwen: no runner has it"
    )
    assert standing_in(Substitution("qwen", "llama", "NEWER")).endswith("in place of qwen: its runners fail")


def test_the_line_does_not_run_into_the_text() -> None:
    wrap = WordWrap(20)
    assert wrap.break_line() == ""
    wrap.feed("some words")
    assert wrap.break_line() == "\n"
    assert wrap.break_line() == ""
    assert wrap.feed("nineteen characters") == "nineteen characters"
