"""Members take different sides of one request, and a model composes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from chorus.core.ensemble.prompts import SHOWN_CHARACTERS, clipped, composing_request, question_of
from chorus.core.ensemble.records import Answer, Member
from chorus.core.ensemble.steps import SIDE_MARK, Ask, Final, Steps, Task, best_agreed, drafts

FACETS: Mapping[str, Mapping[str, str]] = {
    "story": {
        "plot": "Think of the plot alone: what happens, in what order, and why. Write no prose.",
        "characters": "Think of the characters alone: who they are, what they want, how they change. Write no prose.",
        "tone": "Think of the tone alone: mood, voice, images and rhythm. Write no prose.",
    },
    "trade": {
        "bull": "Argue for it alone: what speaks for a gain, and how strongly.",
        "bear": "Argue against it alone: what speaks for a loss, and how strongly.",
        "risk": "Look at risks alone: what could go wrong, how badly, and how one would limit it.",
    },
    "decision": {
        "for": "Argue for it alone, as well as it can be done.",
        "against": "Argue against it alone, as well as it can be done.",
        "risk": "Look at risks alone: what could go wrong, how badly, and what could be done about it.",
    },
}
"""Shipped sets: the sides by name, each with its member's instructions."""

DEFAULT_SET = "decision"


def facets(task: Task) -> Steps:
    """A text composed from the members' sides; where it can't be, the most confident side."""
    answers = yield from drafts(task)
    if not answers:
        return None
    composed = yield Final(_compose(task, answers))
    return composed[0] if composed else best_agreed(task, answers)


def facet_instructions(members: Sequence[Member], facet_set: str) -> tuple[Member, ...]:
    """Members with sides of the set, in turn, where they have no instructions of their own."""
    sides = list(FACETS[facet_set or DEFAULT_SET].items())
    sided: list[Member] = []
    for place, member in enumerate(members):
        side, instructions = sides[place % len(sides)]
        if member.instructions:
            sided.append(member)
        else:
            sided.append(replace(member, member_id=f"{side}-{member.member_id}", instructions=instructions))
    return tuple(sided)


def _compose(task: Task, answers: Sequence[Answer]) -> Ask:
    most = SHOWN_CHARACTERS // len(answers)
    sides = "\n\n".join(f"{answer.part_id}:\n{clipped(answer.text, most)}" for answer in answers)
    text = (
        f"{question_of(task.request.prompt)}\n\n"
        f"Several people have looked at different sides of this:\n\n{sides}\n\n"
        "Answer the request above as a whole, using what they found where it is sound. Don't mention them."
    )
    return Ask(f"{SIDE_MARK}aggregator", composing_request(task.request, task.aggregator_model, text))
