"""Small models first, greater ones while confidence is low (FrugalGPT: L. Chen et al., 2023, arXiv 2305.05176)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

from chorus.core.ensemble.records import Answer
from chorus.core.ensemble.steps import Round, Steps, Task, all_sets, ask_member, best_agreed


def cascade(task: Task) -> Steps:
    """The answer of the first model whose confidence reaches the threshold; else of the greatest that has one. Where
    none could answer, the next simpler set is gone up in the same way.

    Samples of one model are asked together, and agree or don't. Members come ordered by size.
    """
    best: Answer | None = None
    left = [[tuple(tier) for _, tier in groupby(members, key=attrgetter("model"))] for members in all_sets(task)]
    while left and best is None:
        tiers = left.pop(0)
        while tiers:
            asks = tuple(ask_member(task, member) for member in tiers.pop(0))
            answers = yield Round(asks, task.quorum, waits=not (best or tiers or left))
            best = best_agreed(task, answers) or best
            if answers and best is not None and confidence(task, best, answers) >= task.threshold:
                return best
    return best


def confidence(task: Task, best: Answer, answers: Sequence[Answer]) -> float:
    """How likely the best of a model's answers is right."""
    measures = task.measures
    agreeing = [one.confidence for one in answers if one is best or measures.same_answer(one.text, best.text)]
    return measures.confidence_of_all(len(agreeing) / len(answers), agreeing, len(answers))
