"""Which strategy suits a request where its caller leaves that open."""

from __future__ import annotations

from collections.abc import Sequence

from chorus.core.ensemble.records import Complexity, Member, Strategy
from chorus.core.generation import GenerationRequest

_SHORT_TOKENS = 64


def choose_strategy(request: GenerationRequest, complexity: Complexity, member_count: int) -> Strategy:
    """One model where there is no other; a vote where answers are short enough to agree; else a text composed from
    drafts for hard questions, and small models first for the others."""
    if member_count < 2:
        return Strategy.ROUTE
    most = request.stop.max_tokens
    if most is not None and most <= _SHORT_TOKENS:
        return Strategy.VOTE
    return Strategy.CASCADE if complexity in (Complexity.SIMPLE, Complexity.MEDIUM) else Strategy.REFINE


def weighed_members(members: Sequence[Member]) -> tuple[Member, ...]:
    """Of several models each one's first answer alone: where answers are weighed, further samples don't help.

    Measured: benchmarks/quality.py. A single model keeps its samples.
    """
    first = tuple(member for member in members if not member.draw)
    return first if len(first) > 1 else tuple(members)
