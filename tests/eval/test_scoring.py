"""Scores and reports."""

from __future__ import annotations

import pytest

from chorus.core.errors import InvalidRequestError
from chorus.core.generation import TokenLogprob
from chorus.eval import report
from chorus.eval.running import Contender, Outcome
from chorus.eval.scoring import continuation, is_right, likeliest, said_yes


@pytest.mark.parametrize(
    ("text", "right"),
    [(" Paris.", True), ("The answer is Paris", True), ("paris, France", False), ("", False), ("1,234", True)],
)
def test_answers_are_right_but_for_their_form(text: str, right: bool) -> None:
    assert is_right(text, ["Paris", "1234"]) is right


def test_a_continuation_is_the_tokens_that_hold_it() -> None:
    tokens = [
        TokenLogprob(index, logprob, piece)
        for index, (logprob, piece) in enumerate([(-9.0, b"A:"), (-1.0, b" Par"), (-0.5, b"is")])
    ]
    assert continuation(tokens, " Paris") == -1.5
    assert continuation(tokens, "is") == -0.5
    assert continuation(tokens, "A: Paris") == -10.5


def test_long_choices_have_no_disadvantage() -> None:
    assert likeliest(["a", "long answer"], [-2.0, -3.0]) == "long answer"
    assert likeliest(["a", "b"], [-1.0, -2.0]) == "a"


def test_judges_say_yes_or_no() -> None:
    assert said_yes("Yes.")
    assert said_yes(" yes, it is")
    assert not said_yes("No, yes would be wrong")
    assert not said_yes("")


def test_contenders_by_name() -> None:
    contender = Contender.parse("vote:a*3,b")
    assert [(member.model, member.sample_count) for member in contender.ensemble.members] == [("a", 3), ("b", 1)]
    for wrong in ("election", "vote:a*0"):
        with pytest.raises(InvalidRequestError, match="STRATEGY"):
            Contender.parse(wrong)


def test_a_report_compares_like_with_like() -> None:
    outcomes = [
        Outcome(name, f"{index}", "sums", score=float(index % bad != 0), seconds=index / 10, tokens=5, confidence=0.5)
        for index in range(60)
        for name, bad in (("route", 2), ("<vote>", 4))
    ]
    outcomes.append(Outcome("route", "late", "sums", error="UNAVAILABLE: gone"))
    route, vote = report.rows(outcomes)
    assert (route.count, route.errors, vote.count) == (61, 1, 60)
    assert route.better is None
    assert vote.better is not None
    assert vote.better.mean == 0.25
    assert vote.calibration_error == pytest.approx(0.25)
    page = report.page(outcomes, title="a & b")
    assert "<vote>" not in page
    assert "&lt;vote&gt;" in page
    assert "a &amp; b" in page
    assert page.count("<svg") == 3
