"""A model picks the best answer (L. Zheng et al., 2023, arXiv 2306.05685), anonymised and in both orders.

Models prefer what stands first, so each pair is shown both ways round, and two different picks are a tie. What several
members say the same is shown once; the answer with most behind it defends its place against the others, one after the
other, and keeps it at a tie.
"""

from __future__ import annotations

from chorus.core.ensemble.picks import picked
from chorus.core.ensemble.prompts import SHOWN_CHARACTERS, clipped, question_of, side_request
from chorus.core.ensemble.records import Answer
from chorus.core.ensemble.steps import SIDE_MARK, Ask, Round, Steps, Task, distinct, drafts

MOST_COMPARED = 4
_PICK_TOKENS = 8


def judge(task: Task) -> Steps:
    """The answer that wins every comparison in which the judge is sure."""
    answers = yield from drafts(task)
    finalists = distinct(task, answers)[:MOST_COMPARED]
    if not finalists:
        return None
    best = finalists[0]
    for number, other in enumerate(finalists[1:], start=1):
        picks = yield Round((_compare(task, f"{number}-ab", best, other), _compare(task, f"{number}-ba", other, best)))
        if not picks:  # it has failed or is stuck, and will be with the next ones, too
            break
        said = {pick.part_id[-2:]: picked(pick.text) for pick in picks}
        if said.get("ab") == "B" and said.get("ba") == "A":
            best = other
    return best


def _compare(task: Task, name: str, first: Answer, second: Answer) -> Ask:
    text = (
        f"Question:\n{question_of(task.request.prompt)}\n\n"
        f"Answer A:\n{clipped(first.text, SHOWN_CHARACTERS // 2)}\n\n"
        f"Answer B:\n{clipped(second.text, SHOWN_CHARACTERS // 2)}\n\n"
        "Which answer is better, A or B? Reply with the letter alone."
    )
    request = side_request(task.request, task.aggregator_model, text, most_tokens=_PICK_TOKENS)
    return Ask(f"{SIDE_MARK}judge-{name}", request)
