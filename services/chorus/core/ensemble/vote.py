"""The answer that most agree on (self-consistency: X. Wang et al., 2022, arXiv 2203.11171).

It ends once it is settled: when whoever hasn't answered yet can't change what the answer says any more. Who names a
quorum has that many answers waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from chorus.core.ensemble.prompts import question_of
from chorus.core.ensemble.records import Answer
from chorus.core.ensemble.steps import Ask, Steps, Task, best_agreed, drafts, is_agreed
from chorus.core.ensemble.weighing import best_weighed, is_weighed


def vote(task: Task) -> Steps:
    """Of the greatest party of members that say the same, the most confident answer; by weight where that is learnt."""
    answers = yield from drafts(task, enough=None if task.quorum else partial(_is_settled, task))
    if task.learned is None:
        return best_agreed(task, answers)
    return best_weighed(answers, question_of(task.request.prompt), task.measures.same_answer, task.learned)


def _is_settled(task: Task, answers: Sequence[Answer], coming: Sequence[Ask]) -> bool:
    if task.learned is None:
        return is_agreed(task, answers, len(coming))
    models = [ask.request.model for ask in coming]
    return is_weighed(answers, models, question_of(task.request.prompt), task.measures.same_answer, task.learned)
