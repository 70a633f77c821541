"""Members answer, review each other's answers, and a chair concludes."""

from __future__ import annotations

from collections.abc import Sequence

from chorus.core.ensemble.prompts import composing_request, question_of, shown, side_request
from chorus.core.ensemble.records import Answer
from chorus.core.ensemble.steps import SIDE_MARK, Ask, Final, Round, Steps, Task, best_agreed, drafts, member_of

_REVIEW_TOKENS = 200


def council(task: Task) -> Steps:
    """The chair's text; where it has none, the answer that most agree on."""
    answers = yield from drafts(task)
    if len(answers) < 2:
        return answers[0] if answers else None
    reviews = yield Round(tuple(_review(task, own, answers) for own in answers), task.quorum)
    composed = yield Final(_conclude(task, answers, reviews))
    return composed[0] if composed else best_agreed(task, answers)


def _review(task: Task, own: Answer, answers: Sequence[Answer]) -> Ask:
    """What a member says of the others' answers, which it isn't told whose they are."""
    others = [answer.text for answer in answers if answer is not own]
    text = (
        f"Question:\n{question_of(task.request.prompt)}\n\n{shown(others, 'Answer')}\n\n"
        "Say briefly of each answer what is right and what is wrong in it, and which one is best."
    )
    request = side_request(task.request, member_of(task, own).model, text, most_tokens=_REVIEW_TOKENS)
    return Ask(f"{SIDE_MARK}review-{own.part_id}", request)


def _conclude(task: Task, answers: Sequence[Answer], reviews: Sequence[Answer]) -> Ask:
    answers_shown = shown([answer.text for answer in answers], "Answer")
    reviews_shown = shown([review.text for review in reviews], "Review")
    text = (
        f"Question:\n{question_of(task.request.prompt)}\n\n{answers_shown}\n\n"
        f"What their authors say of each other's answers:\n\n{reviews_shown}\n\n"
        "You chair this council. Write its answer to the question, without mentioning the council or its members."
    )
    return Ask(f"{SIDE_MARK}chair", composing_request(task.request, task.aggregator_model, text))
