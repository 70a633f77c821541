"""How likely answers are right: by their tokens' log-probabilities, and by how many agree. All are 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

# What is believed of an answer of which nothing is known.
UNKNOWN = 0.5


def confidence_of(logprobs: Sequence[float] | None) -> float:
    """Of one answer by itself: the geometric mean of its tokens' probabilities; UNKNOWN where there are none."""
    if not logprobs:
        return UNKNOWN
    return exp(min(0.0, sum(logprobs) / len(logprobs)))


def confidence_of_all(agreement: float, agreeing: Sequence[float], answered: int) -> float:
    """Of the answer of an ensemble: `agreement` is the share of the `answered` that agree with it, `agreeing` their
    confidences.

    One answer alone agrees with itself, which says nothing; the more there are, the more their agreement counts.
    """
    by_themselves = sum(agreeing) / len(agreeing) if agreeing else UNKNOWN
    weight = 1.0 - 1.0 / max(1, answered)
    return weight * agreement + (1.0 - weight) * by_themselves
