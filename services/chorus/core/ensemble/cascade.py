"""Small models first, greater ones while confidence is low (FrugalGPT: L. Chen et al., 2023, arXiv 2305.05176)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from chorus.core.ensemble.records import Answer
from chorus.core.ensemble.steps import Round, Steps, Task, ask_member, best_agreed


def cascade(task: Task) -> Steps:
    """The answer of the first model whose confidence reaches the threshold; else of the greatest that has one.

    Samples of one model are asked together, and agree or don't. Members come ordered by size.
    """
    best: Answer | None = None
    for _, members in groupby(task.members, key=lambda member: member.model):
        answers = yield Round(tuple(ask_member(task, member) for member in members), task.quorum)
        best = best_agreed(task, answers) or best
        if answers and best is not None and confidence(task, best, answers) >= task.threshold:
            break
    return best


def confidence(task: Task, best: Answer, answers: Sequence[Answer]) -> float:
    """How likely the best of a model's answers is right."""
    measures = task.measures
    agreeing = [one.confidence for one in answers if one is best or measures.same_answer(one.text, best.text)]
    return measures.confidence_of_all(len(agreeing) / len(answers), agreeing, len(answers))
