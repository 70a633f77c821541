"""Whether two questions have one answer. Cosine alone can't tell: swapped roles have cosine 0.99.

Where numbers, symbols or upper case are written otherwise (`writing.py`) they have not. Else a logistic regression over
what differs between the two (`comparing.py`), whose weights were learned from pairs made by script; see
benchmarks/semantic_cache.py for what it accepts and misses. In doubt they have not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from chorus.core.cache.comparing import FEATURES, differences, least_differences
from chorus.core.cache.lexicon import Lexicon
from chorus.core.cache.reading import read

MAX_QUESTION = 400
"""Characters of a question that the gate looks at; a longer one is like no other."""
_READINGS = 2048  # some 2 KB each


@dataclass(frozen=True, slots=True)
class Weights:
    """`threshold` is the least probability at which two questions count as one."""

    bias: float
    weights: tuple[float, ...]
    threshold: float

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Out of JSON. Raises ValueError for other features than this version's, and for one that speaks for a pair."""
        found: Mapping[str, object] = json.loads(text)
        named = found.get("weights")
        if not isinstance(named, dict) or set(named) != set(FEATURES):
            raise ValueError("the gate's weights are not those of this version's features")
        if any(float(weight) > 0 for weight in named.values()):
            raise ValueError("a difference between two questions can't speak for their having one answer")
        return cls(
            float(str(found["bias"])),
            tuple(float(named[name]) for name in FEATURES),
            float(str(found["threshold"])),
        )

    def probability(self, features: tuple[float, ...]) -> float:
        """That two questions with these differences have one answer."""
        score = self.bias + sum(weight * value for weight, value in zip(self.weights, features, strict=True))
        return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, score))))


class Gate:
    """Decides; pure, and the same for the same questions."""

    def __init__(self, lexicon: Lexicon, weights: Weights) -> None:
        self._lexicon = lexicon
        self._weights = weights
        # What is asked often is compared often: half of the gate's time is reading.
        self._read = lru_cache(_READINGS)(lambda question: read(question, lexicon))

    @property
    def threshold(self) -> float:
        """The least probability at which two questions count as one."""
        return self._weights.threshold

    def probability(self, one: str, other: str, cosine: float) -> float:
        """How sure it is that one answer serves both, 0 to 1."""
        if max(len(one), len(other)) > MAX_QUESTION:
            return float(one == other)
        if self._read(one).writing.contradicts(self._read(other).writing):
            return 0.0
        return self._weights.probability(self.features(one, other, cosine))

    def sure(self, one: str, other: str, cosine: float) -> float | None:
        """The probability where the gate accepts the pair, else None; quicker than `probability` for most others."""
        if max(len(one), len(other)) <= MAX_QUESTION:
            first, second = self._read(one), self._read(other)
            if first.writing.contradicts(second.writing):
                return None
            least = least_differences(first, second, cosine)
            if self._weights.probability(least) < self.threshold:
                return None
        probability = self.probability(one, other, cosine)
        return probability if probability >= self.threshold else None

    def features(self, one: str, other: str, cosine: float) -> tuple[float, ...]:
        """What differs, in the order of FEATURES."""
        return differences(self._read(one), self._read(other), self._lexicon, cosine)

    def accepts(self, one: str, other: str, cosine: float) -> bool:
        """Whether one answer serves both."""
        return self.sure(one, other, cosine) is not None
