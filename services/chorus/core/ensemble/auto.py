"""Which strategy suits a request where its caller leaves that open."""

from __future__ import annotations

from chorus.core.ensemble.records import Complexity, Strategy
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
