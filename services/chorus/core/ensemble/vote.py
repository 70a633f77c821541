"""The answer that most agree on (self-consistency: X. Wang et al., 2022, arXiv 2203.11171)."""

from __future__ import annotations

from chorus.core.ensemble.steps import Steps, Task, best_agreed, drafts


def vote(task: Task) -> Steps:
    """Of the greatest party of members that say the same, the most confident answer."""
    return best_agreed(task, (yield from drafts(task)))
