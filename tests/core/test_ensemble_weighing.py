"""Answers weighed by what is known of who says so."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.ensemble.answers import same_answer
from chorus.core.ensemble.auto import weighed_members
from chorus.core.ensemble.confidence import UNKNOWN, confidence_of
from chorus.core.ensemble.learned import LEARNED
from chorus.core.ensemble.records import Answer, Member
from chorus.core.ensemble.weighing import (
    ANY_MODEL,
    FEATURES,
    Learned,
    Weights,
    best_weighed,
    features,
    is_weighed,
    kind_of,
    probability,
    words_of,
)

PLAIN = Weights((2.0, 1.0, 0.0, 0.0, 0.0))
KNOWN = Learned(
    {"sums": frozenset(["what", "is", "0", "+"]), "past": frozenset(["what", "is", "the", "past", "tense", "of"])},
    {ANY_MODEL: PLAIN, "counts": Weights(PLAIN.answer, {"sums": 3.0, "past": -3.0}), "talks": PLAIN},
)

_LOGPROBS = st.lists(st.floats(-30, 0), min_size=1, max_size=4).map(tuple)
_ANSWERS = st.lists(
    st.builds(Answer, st.uuids().map(str), st.sampled_from("abc"), logprobs=_LOGPROBS,
              model=st.sampled_from(["counts", "talks", "new"])),
    min_size=1, max_size=6,
)  # fmt: skip


def answer(text: str, logprob: float, model: str) -> Answer:
    return Answer(f"{model}-{text}", text, logprobs=(logprob,), model=model)


def chosen(prompt: str, *answers: Answer) -> str:
    best = best_weighed(answers, prompt, same_answer, KNOWN)
    assert best is not None
    return best.text


def test_the_model_that_is_good_at_a_kind_is_believed() -> None:
    counted, talked = answer("12", -1.0, "counts"), answer("13", -0.5, "talks")
    assert chosen("What is 5 + 7?", counted, talked) == "12"
    assert chosen("What is the past tense of go?", counted, talked) == "13"


def test_of_an_unknown_kind_only_the_tokens_tell() -> None:
    prompt = "Name a river that flows through Vienna."
    assert kind_of(prompt, KNOWN.kinds) == ""
    assert chosen(prompt, answer("a", -0.2, "counts"), answer("b", -0.1, "talks")) == "b"
    assert chosen(prompt, answer("a", -0.1, "counts"), answer("b", -0.2, "talks")) == "a"


@pytest.mark.parametrize(("margin", "text"), [(0.0, "13"), (0.1, "13"), (0.9, "12")])
def test_the_best_model_of_a_kind_keeps_the_word_unless_another_is_clearly_surer(margin: float, text: str) -> None:
    answers = [answer("12", -4.0, "counts"), answer("13", -0.1, "talks")]
    careful = replace(KNOWN, best={"sums": "counts"}, margin=margin, weights={ANY_MODEL: PLAIN})
    best = best_weighed(answers, "What is 5 + 7?", same_answer, careful)
    assert best is not None
    assert best.text == text
    unknown = best_weighed(answers, "Name a number.", same_answer, careful)
    assert unknown is not None
    assert unknown.text == "13"


def test_examples_before_the_question_do_not_hide_its_kind() -> None:
    assert kind_of("Q: Name a river.\nA: Danube\n\nWhat is 20 + 3?", KNOWN.kinds) == "sums"
    assert kind_of("", KNOWN.kinds) == kind_of("\n\n", KNOWN.kinds) == ""


@given(_ANSWERS, st.sampled_from(["What is 1 + 1?", "Who?", ""]))
@settings(max_examples=60)
def test_whatever_comes_the_best_is_one_of_them(answers: list[Answer], prompt: str) -> None:
    best = best_weighed(answers, prompt, same_answer, KNOWN)
    assert best in answers
    agreed = [Answer("x", "same", logprobs=one.logprobs, model=one.model) for one in answers]
    told = best_weighed([*agreed], prompt, same_answer, KNOWN)
    assert told is not None
    assert told.text == "same"
    assert best_weighed([], prompt, same_answer, KNOWN) is None


@given(_ANSWERS, st.integers(0, 6), st.sampled_from(["What is 1 + 1?", "Who?"]), st.sampled_from([0.0, 0.3, 1.2]))
@settings(max_examples=200)
def test_what_is_settled_stays_whatever_comes(answers: list[Answer], told: int, prompt: str, margin: float) -> None:
    learned = replace(KNOWN, best={"sums": "counts"}, margin=margin, again=0.4)
    early, late = answers[:told], answers[told:]
    if not is_weighed(early, [one.model for one in late], prompt, same_answer, learned):
        return
    before, after = (best_weighed(some, prompt, same_answer, learned) for some in (early, answers))
    assert before is not None
    assert after is not None
    assert after.text == before.text


@pytest.mark.parametrize(
    ("told", "coming", "settled"),
    [
        ([("12", -0.1, "counts")], ["talks"], True),  # the best model is sure: nobody gets ahead of it by the margin
        ([("12", -5.0, "counts")], ["talks"], False),
        ([("12", -0.1, "counts")], ["counts"], False),
        ([("12", -0.1, "counts")], ["a file of somebody's"], False),
        ([("12", -0.1, "talks")], ["counts"], False),
        ([("12", -0.1, "talks"), ("12", -0.1, "new")], ["new"], True),  # even if it is the best model: far ahead
        ([("12", -0.1, "talks"), ("13", -0.1, "new")], ["new"], False),
        ([], ["counts"], False),
    ],
)
def test_a_weighed_vote_is_settled_by_belief(
    told: list[tuple[str, float, str]], coming: list[str], *, settled: bool
) -> None:
    learned = replace(KNOWN, best={"sums": "counts"}, margin=0.3)
    answers = [answer(*one) for one in told]
    assert is_weighed(answers, coming, "What is 5 + 7?", same_answer, learned) is settled


def test_only_the_end_of_a_long_paragraph_tells_its_kind() -> None:
    asked = " What is 12 + 30?"
    assert words_of(f"{'pasted, ' * 5000}{asked * 300}") == words_of(asked)


@given(_LOGPROBS)
def test_features_are_bounded(logprobs: tuple[float, ...]) -> None:
    told = features(logprobs)
    assert len(told) == len(FEATURES)
    assert all(-20.0 <= value <= 1.0 for value in told)


@given(st.lists(st.floats(), max_size=20).map(tuple))
def test_no_number_of_an_engine_makes_a_confidence_that_is_none(logprobs: tuple[float, ...]) -> None:
    """Infinities and NaN included; what can't be a log-probability is as if it had not been told."""
    said = Answer("a", "Paris", logprobs=logprobs)
    assert 0.0 <= confidence_of(said) <= 1.0
    told = tuple(min(0.0, max(logprob, -1000.0)) for logprob in logprobs if logprob <= 1e-3)
    assert confidence_of(said) == confidence_of(replace(said, logprobs=told))


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, 3.0])
def test_who_tells_nothing_but_nonsense_is_not_taken_for_sure(nonsense: float) -> None:
    assert confidence_of(Answer("a", "Paris", logprobs=(nonsense,) * 3)) == UNKNOWN


@pytest.mark.parametrize("model", [*LEARNED.weights, "a new one"])
def test_what_was_learnt_is_sound(model: str) -> None:
    """Sure answers are believed more than unsure ones, and nobody is believed blindly."""
    sure, unsure = ((Answer("one", "text", logprobs=(value, value), model=model)) for value in (-0.01, -3.0))
    assert 0.02 < confidence_of(unsure) < confidence_of(sure) < 0.98 or confidence_of(unsure) < 0.02
    assert set(LEARNED.of(model).kinds) <= set(LEARNED.kinds)
    assert set(LEARNED.best) == set(LEARNED.kinds)
    assert set(LEARNED.best.values()) <= set(LEARNED.weights)
    assert len(LEARNED.of(model).answer) == len(FEATURES)


def test_probabilities_are_safe_at_the_ends() -> None:
    assert probability(-1000.0) == 0.0
    assert probability(1000.0) == 1.0
    assert probability(0.0) == 0.5


def test_samples_are_for_a_single_model() -> None:
    one, again, other = Member("a-1", "a"), Member("a-2", "a", draw=1), Member("b", "b")
    assert weighed_members((one, again, other)) == (one, other)
    assert weighed_members((one, again)) == (one, again)
