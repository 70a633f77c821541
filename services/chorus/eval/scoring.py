"""Whether an answer is right: by its text, by how likely each choice is, or by the word of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

from chorus.core.ensemble.answers import normalise
from chorus.core.generation import TokenLogprob
from chorus.eval.dataset import Item


class Scoring(StrEnum):
    """How answers are scored."""

    EXACT = "exact"
    CHOICE = "choice"
    JUDGE = "judge"


def is_right(text: str, answers: Iterable[str]) -> bool:
    """Whether a text is one of the answers, but for its form: case, punctuation, a lead-in, commas in numbers."""
    said = normalise(text)
    return bool(said) and said in {normalise(answer) for answer in answers}


def likeliest(choices: Sequence[str], logprobs: Sequence[float]) -> str:
    """The choice with the greatest log-probability for each of its bytes, so that short ones have no advantage."""
    places = range(len(choices))
    return choices[max(places, key=lambda place: logprobs[place] / max(1, len(choices[place].encode())))]


def continuation(tokens: Sequence[TokenLogprob], text: str) -> float:
    """The log-probability of a prompt's last part: of the tokens, from the end, that together hold `text`."""
    left, total = len(text.encode()), 0.0
    for token in reversed(tokens):
        if left <= 0:
            break
        left -= len(token.bytes)
        total += token.logprob
    return total


def judging_prompt(item: Item, text: str) -> str:
    """What a judge is asked."""
    return (
        f"Question:\n{item.prompt}\n\nRight answer:\n{' or '.join(item.answers)}\n\n"
        f"Student's answer:\n{text.strip()}\n\nIs the student's answer right? Reply with yes or no alone."
    )


def said_yes(text: str) -> bool:
    """Whether a judge's reply begins with a yes."""
    words = (word for word in normalise(text).split() if any(map(str.isalnum, word)))  # a tick may stand before it
    return next(words, "") == "yes"
