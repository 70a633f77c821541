"""The estimate of how hard a question is. How often it is right: `python -m benchmarks.complexity`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.ensemble.complexity import FEATURES, complexity_of, estimate_complexity, features
from chorus.core.ensemble.complexity_learned import WEIGHTS
from chorus.core.ensemble.records import Complexity
from chorus.core.generation import Conversation, Message, MessageRole, TextPart, TokenPrompt
from tests.core.ensemble_world import request


@pytest.mark.parametrize(
    ("question", "level"),
    [
        ("What is the capital of Portugal?", Complexity.SIMPLE),
        ("How does a fridge work?", Complexity.MEDIUM),
        (
            "Plan a trip for eight people on a budget of 900 euros: schedule, shopping list, and what if it rains.",
            Complexity.COMPLEX,
        ),
        ("Prove that every compact manifold embeds, and derive a bound on the dimension.", Complexity.EXPERT),
    ],
)
def test_plain_cases(question: str, level: Complexity) -> None:
    assert complexity_of(question) is level


def test_every_level_has_a_weight_for_each_feature() -> None:
    assert set(WEIGHTS) == set(Complexity)
    assert all(len(weights) == len(FEATURES) for weights in WEIGHTS.values())


@given(st.text(max_size=300))
def test_any_text_has_a_level(text: str) -> None:
    assert complexity_of(text) in Complexity
    assert all(value >= 0.0 for value in features(text))


@given(st.lists(st.sampled_from(["Prove", "the", "lemma", "what", "is", "?", "12", "+"]), min_size=1, max_size=20))
def test_case_and_spaces_around_change_nothing(words: list[str]) -> None:
    text = " ".join(words)
    assert features(f"  {text.upper()} ") == features(text.lower())


def test_what_was_pasted_in_the_middle_counts_for_nothing() -> None:
    asked = "Is this true? " * 30
    pasted = "Prove the lemma; derive the bound. " * 100
    assert features(asked + pasted + asked) == features(asked + asked)


def test_nor_does_the_middle_of_what_has_no_spaces() -> None:
    """A table, a picture in base64: reading megabytes of it took seconds."""
    end = "a,b=" * 1000
    assert features(f"Is {end}{'why,' * 5000}{end}?") == features(f"Is {end}{end}?")


def test_of_a_conversation_the_last_question_counts() -> None:
    hard = "Prove the lemma, derive the bound, and verify it formally against the axioms of topology."
    turns = [(MessageRole.USER, hard), (MessageRole.ASSISTANT, hard), (MessageRole.USER, "What is 2 + 2?")]
    conversation = Conversation(tuple(Message(role, (TextPart(text),)) for role, text in turns))
    assert estimate_complexity(request(hard)) is Complexity.EXPERT
    assert estimate_complexity(replace(request(), prompt=conversation)) is Complexity.SIMPLE


def test_token_ids_tell_nothing_and_are_taken_as_simple() -> None:
    assert estimate_complexity(replace(request(), prompt=TokenPrompt((1, 2, 3)))) is Complexity.SIMPLE
