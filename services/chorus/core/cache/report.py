"""What a caller is told of the cache."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CacheOutcome(StrEnum):
    """What became of a request at the cache."""

    EXACT = "exact"
    SEMANTIC = "semantic"
    JOINED = "joined"
    MISS = "miss"
    BYPASSED = "bypassed"
    STALE = "stale"


GIVEN_AGAIN = frozenset({CacheOutcome.EXACT, CacheOutcome.SEMANTIC, CacheOutcome.STALE})
"""Those in which the answer was there before."""


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What became of a request; `age_s` of the answer given again. `question` to `confidence` are of semantic hits."""

    outcome: CacheOutcome
    age_s: float | None = None
    question: str = ""
    similarity: float = 0.0
    confidence: float = 0.0
    reason: str = ""
