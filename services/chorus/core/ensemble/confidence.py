"""How likely answers are right: by their tokens' log-probabilities, and by how many agree. All are 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence

from chorus.core.ensemble.learned import LEARNED
from chorus.core.ensemble.records import Answer
from chorus.core.ensemble.weighing import believable, evidence, probability

# What is believed of an answer of which nothing is known.
UNKNOWN = 0.5


def confidence_of(answer: Answer) -> float:
    """Of one answer by itself, calibrated on recorded answers; UNKNOWN where its engine tells no log-probabilities.

    Of one that says nothing it is 0: its end alone is always likely.
    """
    if answer.is_blank:
        return 0.0
    if not believable(answer.logprobs or ()):
        return UNKNOWN
    return probability(evidence(answer, LEARNED.of(answer.model)))


def confidence_of_all(agreement: float, agreeing: Sequence[float], answered: int) -> float:
    """Of the answer of an ensemble: `agreement` is the share of the `answered` that agree with it (of a composed text,
    how much of it they bear out, which nobody has calibrated), `agreeing` their confidences.

    One answer alone agrees with itself, which says nothing; the more there are, the more their agreement counts.
    """
    by_themselves = sum(agreeing) / len(agreeing) if agreeing else UNKNOWN
    weight = 1.0 - 1.0 / max(1, answered)
    return weight * agreement + (1.0 - weight) * by_themselves
