"""One model answers; where it can't, the next one."""

from __future__ import annotations

from chorus.core.ensemble.records import Answer
from chorus.core.ensemble.steps import Final, Steps, Task, all_sets, ask_member


def route(task: Task) -> Steps:
    """The answer of the first member that has one, streamed as it comes."""
    for members in all_sets(task):
        for member in members:
            answers: tuple[Answer, ...] = yield Final(ask_member(task, member), waits=True)
            if answers:
                return answers[0]
    return None
