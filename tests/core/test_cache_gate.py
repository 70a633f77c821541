"""The gate: what it reads in a question, and that in doubt two questions are two."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.cache.comparing import FEATURES, differences
from chorus.core.cache.gate import MAX_QUESTION, Weights
from chorus.core.cache.lexicon import Lexicon
from chorus.core.cache.reading import read
from chorus.store.gate import read_gate, read_lexicon

NEAR = 0.99

SAME = [
    ("What's the tallest tower in Lisbon?", "Could you please tell me what the tallest tower in Lisbon is?"),
    ("In Kotlin, how do I reverse a string?", "How can I reverse a string in Kotlin?"),
    ("Did the storm destroy the pier?", "Was the pier destroyed by the storm?"),
    ("How do I purchase a ticket?", "How do I buy a ticket?"),
    ("A ferry to Naxos from Paros?", "A ferry from Paros to Naxos?"),
    ("What is 1,500 minus 40?", "What's 1500 minus 40?"),
    ("What's 3 - 5?", "Could you tell me what 3 - 5 is?"),
    ("What is (2 + 3) * 4?", "What's (2 + 3) * 4?"),
    ('What does "hello" mean?', "What does hello mean?"),
    ("What is the capital of Peru (in English)?", "What's the capital of Peru, in English?"),
    ("Hi, What is the tallest tower in Lisbon?", "Tell me what the tallest tower in Lisbon is."),
]
OTHERS = [
    ("Did the storm destroy the pier?", "Did the pier destroy the storm?"),
    ("Did the storm destroy the pier?", "Was the storm destroyed by the pier?"),
    ("A ferry to Naxos from Paros?", "A ferry from Naxos to Paros?"),
    ("Is it safe to swim here?", "Isn't it safe to swim there?"),
    ("Is it safe to swim here?", "Is it not safe to swim here?"),
    ("How many legs has a crab?", "How many arms has a crab?"),
    ("What is 3 plus 5?", "What is 3 plus 15?"),
    ("Call me at 5 pm.", "Call me before 5 pm."),
    ("When was the bridge built?", "Where was the bridge built?"),
    ("Who will win the cup?", "Who won the cup?"),
    ("What is the capital of Austria?", "What is the capital of Australia?"),
    ("Is 5 > 3?", "Is 5 < 3?"),
    ("What is 3 - 5?", "What is 5 - 3?"),
    ("What is 10 / 2?", "What is 2 / 10?"),
    ("Is 5 > 3?", "Is 3 > 5?"),
    ("What is (2 + 3) * 4?", "What is 2 + (3 * 4)?"),
    ("What is -5 + 3?", "What is 5 + -3?"),
    ("What is 12 % 5?", "What is 5 % 12?"),
    ("What is 5!?", "What is 5?"),
    ("Sort 3, 1, 2", "Sort 2, 1, 3"),
    ("Sort 3,1,2", "Sort 31,2"),
    ("Sort 3,1,2", "Sort 2,1,3"),
    ("What day is 03/04/2025 in the US?", "What day is 04/03/2025 in the US?"),
    ("Convert 3:45 to minutes", "Convert 45:3 to minutes"),
    ("How many days are between 2024-03-01 and 2024-01-03?", "How many days are between 2024-01-03 and 2024-03-01?"),
    ("What is 10 minus 4?", "What is 4 minus 10?"),
    ("What is 2 plus 3 minus 1?", "What is 2 minus 3 plus 1?"),
    ("What is ten minus four?", "What is four minus ten?"),
    ("How do == and === differ?", "How do === and == differ?"),
    ("Solve 2x = 6", "Solve 6x = 2"),
    ("What is f(2) if f(x) = 3x?", "What is f(3) if f(x) = 2x?"),
    ("What does print(a[i-1]) print?", "What does print(a[1-i]) print?"),
    ("What does print([1, 2]) show?", "What does print('1, 2') show?"),
    ("What does 'a' * 3 give in Python?", "What does a * '3' give in Python?"),
    ("What does len('ab') give?", "What does len(ab) give?"),
    ("What does `a = b` do in C?", "What does `b = a` do in C?"),
    ("What does {1: a, 2: b} mean?", "What does {1: b, 2: a} mean?"),
    ("How is AIDS treated?", "How is aids treated?"),
    ("AIDS is treated how?", "How is aids treated?"),
    ("What does US mean?", "What does us mean?"),
    ("What is a turkey?", "What is Turkey?"),
    ("Write a poem about Polish furniture", "Write a poem about polish furniture"),
    ("May I park here?", "Must I park here?"),
    ("Do all birds fly?", "Do some birds fly?"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_one_question_asked_in_two_ways(one: str, other: str) -> None:
    assert read_gate().accepts(one, other, NEAR)
    assert read_gate().accepts(other, one, NEAR)


@pytest.mark.parametrize(("one", "other"), OTHERS)
def test_two_questions_that_look_alike(one: str, other: str) -> None:
    assert not read_gate().accepts(one, other, 1.0)
    assert not read_gate().accepts(other, one, 1.0)


def test_what_the_vectors_hold_for_different_is_so_whatever_the_words() -> None:
    one, other = SAME[0]
    assert not read_gate().accepts(one, other, 0.2)


@settings(max_examples=60, deadline=None)
@given(one=st.text(max_size=60), other=st.text(max_size=60), cosine=st.floats(-1.5, 1.5))
def test_any_text_is_read_and_the_order_of_the_two_does_not_matter(one: str, other: str, cosine: float) -> None:
    lexicon = read_lexicon()
    there = differences(read(one, lexicon), read(other, lexicon), lexicon, cosine)
    back = differences(read(other, lexicon), read(one, lexicon), lexicon, cosine)
    named, named_back = dict(zip(FEATURES, there, strict=True)), dict(zip(FEATURES, back, strict=True))
    assert all(value >= 0.0 for value in there)
    # Which of several like words is paired with which may differ; whether anything differs may not.
    assert (named["differences"] == 0) == (named_back["differences"] == 0)
    same = differences(read(one, lexicon), read(one, lexicon), lexicon, 1.0)
    assert not any(same)


_FORMULAS = st.lists(
    st.sampled_from(["3", "5", "12", "0.5", "x", "(", ")", "+", "-", "*", "<"]), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(one=_FORMULAS, other=_FORMULAS)
def test_of_two_formulas_only_the_very_same_are_one(one: list[str], other: list[str]) -> None:
    first, second = " ".join(one), " ".join(other)
    if set("+-*<").isdisjoint(one) or set("+-*<").isdisjoint(other):
        first, second = f"1 + {first}", f"1 + {second}"
    assert read_gate().accepts(f"What is {first}?", f"What's {second}?", 1.0) == (first == second)


@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["ship", "crew", "captain", "wind", "sail", "mast", "storm"]),
        min_size=2,
        max_size=5,
    ),
    extra=st.sampled_from(["lantern", "anchor", "never", "every", "before", "7"]),
    at=st.integers(0, 5),
)
def test_a_word_more_is_another_question(words: list[str], extra: str, at: int) -> None:
    one = "Why does the " + " ".join(words) + "?"
    other = "Why does the " + " ".join([*words[:at], extra, *words[at:]]) + "?"
    assert not read_gate().accepts(one, other, 1.0)


def test_a_long_question_is_like_itself_alone() -> None:
    long = "why " * MAX_QUESTION
    assert read_gate().accepts(long, long, 1.0)
    assert not read_gate().accepts(long, long + "?", 1.0)


_WORDS = st.lists(
    st.sampled_from(["when", "does", "not", "no", "the", "port", "ports", "open", "3", "4", "all", "of", "to", "by"]),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(one=_WORDS, other=_WORDS, cosine=st.floats(0.5, 1.0))
def test_what_is_seen_at_once_never_says_other_than_the_whole_look(
    one: list[str], other: list[str], cosine: float
) -> None:
    gate, first, second = read_gate(), " ".join(one) + "?", " ".join(other) + "?"
    whole = gate.probability(first, second, cosine)
    assert gate.sure(first, second, cosine) == (whole if whole >= gate.threshold else None)


def test_no_difference_speaks_for_a_pair() -> None:
    assert max(read_gate()._weights.weights) <= 0.0
    told = {"bias": 0.0, "weights": dict.fromkeys(FEATURES, -1.0) | {"words": 0.5}, "threshold": 0.5}
    with pytest.raises(ValueError, match="speak"):
        Weights.parse(json.dumps(told))


def test_weights_of_other_features_are_refused() -> None:
    with pytest.raises(ValueError, match="not those of this version"):
        Weights.parse('{"bias": 0, "weights": {"words": -1}, "threshold": 0.5}')


def test_the_lexicon_knows_forms_and_synonyms_apart() -> None:
    lexicon = Lexicon(["# a comment", "= big large", "~ mice mouse"])
    assert lexicon.inflected("mice", "mouse")
    assert lexicon.inflected("stopped", "stops")
    assert lexicon.synonymous("big", "large")
    assert not lexicon.inflected("big", "large")
    assert not lexicon.synonymous("big", "mouse")
    with pytest.raises(ValueError, match="line 1"):
        Lexicon(["big large"])
