"""The first good answer wins; whoever is slower is cancelled."""

from __future__ import annotations

from collections.abc import Sequence

from chorus.core.ensemble.records import Answer
from chorus.core.ensemble.steps import Ask, Steps, Task, drafts
from chorus.core.generation import FinishReason


def race(task: Task) -> Steps:
    """The first answer that came to its end; where none does, the first of all."""
    answers = yield from drafts(task, quorum=0, enough=_has_good)
    return next(filter(is_good, answers), answers[0] if answers else None)


def is_good(answer: Answer) -> bool:
    """Whether an answer wasn't cut off for lack of room."""
    return answer.reason is not FinishReason.CONTEXT_FULL


def _has_good(answers: Sequence[Answer], coming: Sequence[Ask]) -> bool:
    del coming  # however good
    return any(map(is_good, answers))
