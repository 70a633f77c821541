"""The answer that most agree on (self-consistency: X. Wang et al., 2022, arXiv 2203.11171)."""

from __future__ import annotations

from chorus.core.ensemble.prompts import question_of
from chorus.core.ensemble.steps import Steps, Task, best_agreed, drafts
from chorus.core.ensemble.weighing import best_weighed


def vote(task: Task) -> Steps:
    """Of the greatest party of members that say the same, the most confident answer; by weight where that is learnt."""
    answers = yield from drafts(task)
    if task.learned is None:
        return best_agreed(task, answers)
    return best_weighed(answers, question_of(task.request.prompt), task.measures.same_answer, task.learned)
