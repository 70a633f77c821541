"""A model writes the answer from the members' drafts (mixture of agents: J. Wang et al., 2024, arXiv 2406.04692)."""

from __future__ import annotations

from collections.abc import Sequence

from chorus.core.ensemble.prompts import composing_request, question_of, shown, side_request
from chorus.core.ensemble.records import Answer
from chorus.core.ensemble.steps import SIDE_MARK, Ask, Final, Round, Steps, Task, best_agreed, drafts, member_of


def refine(task: Task) -> Steps:
    """The aggregator's text, after `round_count` rounds of drafts; where it has none, the draft most agree on."""
    answers = first = yield from drafts(task)
    if len(answers) < 2:
        return answers[0] if answers else None
    for number in range(2, task.round_count + 1):
        asks = tuple(_redraft(task, number, answer.part_id, member_of(task, answer).model, answers) for answer in first)
        drafted = yield Round(asks, task.quorum)
        if not drafted:
            break
        answers = drafted
    composed = yield Final(_compose(task, answers))
    return composed[0] if composed else best_agreed(task, answers)


def _redraft(task: Task, number: int, member_id: str, model: str, drafted: Sequence[Answer]) -> Ask:
    text = _with_drafts(task, drafted) + "Write a better answer of your own. Don't mention the drafts."
    request = side_request(task.request, model, text, most_tokens=None)
    return Ask(f"{SIDE_MARK}{member_id}-{number}", request)


def _compose(task: Task, drafted: Sequence[Answer]) -> Ask:
    text = _with_drafts(task, drafted) + (
        "Write the one answer that the question deserves: keep what is right, correct what is wrong, leave out what "
        "doesn't matter. Some drafts may be wrong. Don't mention the drafts."
    )
    return Ask(f"{SIDE_MARK}aggregator", composing_request(task.request, task.aggregator_model, text))


def _with_drafts(task: Task, drafted: Sequence[Answer]) -> str:
    drafts_shown = shown([answer.text for answer in drafted], "Draft")
    return f"Question:\n{question_of(task.request.prompt)}\n\nDrafts of an answer:\n\n{drafts_shown}\n\n"
