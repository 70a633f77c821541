"""One model answers; where it can't, the next one."""

from __future__ import annotations

from chorus.core.ensemble.records import Answer
from chorus.core.ensemble.steps import Final, Steps, Task, ask_member, at_depth


def route(task: Task) -> Steps:
    """The answer of the first member that has one, streamed as it comes."""
    for depth, members in enumerate((task.members, *task.simpler)):
        for member in members:
            answers: tuple[Answer, ...] = yield Final(ask_member(task, at_depth(member, depth)))
            if answers:
                return answers[0]
    return None
