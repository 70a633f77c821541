"""What judges write, and whom they prefer by it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.ensemble.picks import picked

PREFER_B = [
    "B",
    "b",
    " B.",
    "(B)",
    "[[B]]",
    "**B**",
    "`B`",
    "\\boxed{B}",
    "<answer>B</answer>",
    "B\n\nAnswer B names the city.",
    "B. It is right, while A is a guess.",
    "B. A is incorrect.",
    "Answer: B",
    "**Answer:** B",
    "Answer B",
    "answer b",
    "Option B.",
    "The answer is (B)",
    "The final answer is: B",
    "My verdict: B",
    "B is better",
    "B is better than A.",
    "Answer B is better than A",
    "Answer B is better than Answer A.",
    "B, because it is shorter",
    "B better answers the question",
    "B > A",
    "A < B",
    "B over A",
    "I prefer B to A.",
    "I prefer B over A because",
    "I prefer B.",
    "I'd go with B",
    "I choose B, not A.",
    "I would pick B rather than A",
    "The better answer is B",
    "The better answer is B, since A",
    "A better answer is B.",
    "**A better answer is B.**",
    "A clearly better answer is B.",
    "A more accurate answer is given in B",
    "Verdict: A better answer is B",
    "A BETTER ANSWER IS B",
    "A is worse than B",
    "A is beaten by B",
    "Answer A is clearly outperformed by answer B.",
    "While A is more detailed, B is correct.",
    "Both are close. While A is better written, B is right",
    "Although A is better, B",
    "Whereas A is better written, B is correct.",
    "Both are good, though B is better",
    "A is good, but worse than B",
    "While A is correct, it is less complete than B.",
    "A is beaten by a better answer, B",
    "A loses to B",
    "A has more errors than B.",
    "B has fewer errors than A.",
    "B has less errors than A",
    "A is more confusing than B",
    "B is less verbose than A",
    "B catches more mistakes than A",
    "Compared with A, B has fewer errors",
    "Unlike A, B names the city",
    "B surpassed A",
    "B outperformed A",
    "B outperforms A by far",
    "B by far outperforms A",
    "B wins despite a mistake",
    "Reject A, accept B.",
    "A is rejected. B",
    "<b>B</b>",
    "<b>Answer:</b> <i>B</i>",
    "A is good, but B is better.",
    "Answer A is good but Answer B is better",
    "Both are good, but B is better",
    "Between A and B, I prefer B.",
    "A or B? B.",
    "Compared with A, B is better",
    "B's answer is better",
    "B gives the right city",
    "B isn't wrong. B",
]
PREFER_A = [
    "A",
    "a",
    "A.",
    "(A)",
    "**A**",
    "Answer: A",
    "Answer A",
    "answer a",
    "The better answer is A",
    "I prefer A.",
    "A is better",
    "A is the better answer",
    "A clearly wins",
    "A provides more detail",
    "A would be better",
    "A over B",
    "A > B",
    "A, as it is shorter",
    "A because it is shorter",
    "A's answer is better",
    "Answer A better addresses the question",
    "Both answers are right, A is the better one",
    "B is worse than A",
    "A. B is wrong",
    "A instead of B",
    "A better than B",
    "A preferred to B",
    "A superior to B",
    "A beat B",
    "A outperformed B",
    "A even though B is longer",
    "<b>A</b>",
    "i prefer a to b",
    "a > b",
    "a is better than b",
    "while b is longer, a is better",
]
PREFER_NOBODY = [
    "",
    "?",
    "Neither",
    "Neither A nor B",
    "neither is better",
    "Both",
    "Both A and B are good",
    "A and B",
    "A or B",
    "A/B",
    "A, B",
    "A and B are equally good.",
    "A is as good as B",
    "A is not better than B",
    "A isn't better than B",
    "I can't say whether A is better",
    "It is a tie between A and B",
    "It's a tie.",
    "a good one",
    "A good one",
    "A better answer",
    "A better answer would be one that names the city",
    "The better answer is",
    "The better answer is a",
    "I prefer a shorter answer",
    "A is better in style. B is better in facts.",
    "A is short while B is complete",
    "Although A is correct, it's not as clear as B",
    "Even though A is longer and better written B is right",
    "A is close to B",
    "A is a poor answer compared to B",
    "A is second to B",
    "A is longer than B",
    "A scores lower than B",
    "A is nearly better than B",
    "A is vague",
    "A is good but lacks the depth of B",
    "A is more verbose and less accurate than B",
    "A has mistakes",
    "A is outperformed",
    "I reject A",
    "i prefer a shorter answer",
    "a better answer",
    "A: 3\nB: 5",
    "Not B",
    "Answer C",
    "AB",
    "Apples and bananas",
]


@pytest.mark.parametrize(
    ("text", "label"),
    [(text, label) for label, texts in (("A", PREFER_A), ("B", PREFER_B), ("", PREFER_NOBODY)) for text in texts],
)
def test_what_judges_write_is_read(text: str, label: str) -> None:
    assert picked(text) == label
    assert picked(f"  {text}\n") == label


decoration = st.text(st.characters(exclude_categories=["L", "N", "Cs"]), max_size=8)


@given(decoration, st.sampled_from("AaBb"), decoration)
def test_a_lone_label_is_read_in_any_decoration(before: str, label: str, after: str) -> None:
    assert picked(before + label + after) == label.upper()


@given(
    st.sampled_from(
        ["Answer: {}", "I prefer {}.", "The better answer is {}", "{} is better than {}", "{}. {} is wrong"]
    ),
    st.sampled_from(["AB", "BA"]),
)
def test_no_label_is_read_better_than_the_other(said: str, labels: str) -> None:
    assert picked(said.format(*labels)) == labels[0]


@given(st.text("ABab isnotbetter.,\n<>", max_size=200))
def test_whatever_is_said_is_read_as_one_of_three(text: str) -> None:
    assert picked(text) in ("A", "B", "")
