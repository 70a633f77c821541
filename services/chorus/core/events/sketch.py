"""A distribution of positive numbers in little memory, whose quantiles are right within 2% and that can be merged.

A histogram with buckets that grow by a constant factor: the DDSketch of C. Masson, J. E. Rim and H. K. Lee, "DDSketch:
A Fast and Fully-Mergeable Quantile Sketch with Relative-Error Guarantees" (VLDB 2019), without its collapsing: a span
from a millisecond to an hour has some 400 buckets.
"""

from __future__ import annotations

from collections import Counter
from math import ceil, log

GROWTH = 1.04
"""Of the buckets: bucket i holds what is over GROWTH**(i-1) and at most GROWTH**i."""

LEAST = 1e-6
"""What is smaller counts as zero; so does what is no number of this kind at all."""

_LOG_GROWTH = log(GROWTH)
# Beyond, numbers would make buckets without bound.
MOST = 1e12


class Sketch:
    """The numbers seen so far."""

    __slots__ = ("counts", "sum", "zeros")

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()  # by bucket
        self.zeros = 0
        self.sum = 0.0

    @property
    def count(self) -> int:
        """How many numbers there were."""
        return self.zeros + sum(self.counts.values())

    @property
    def mean(self) -> float:
        """Their average; 0 for none."""
        count = self.count
        return self.sum / count if count else 0.0

    def add(self, value: float) -> None:
        """Another number."""
        if not value >= LEAST:
            self.zeros += 1
            return
        value = min(value, MOST)
        self.counts[ceil(log(value) / _LOG_GROWTH)] += 1
        self.sum += value

    def merge(self, other: Sketch) -> None:
        """All numbers of another one, too."""
        self.counts.update(other.counts)
        self.zeros += other.zeros
        self.sum += other.sum

    def quantile(self, share: float) -> float:
        """The number that this share (0 to 1) of all are at most, within 2%; 0 where there is none."""
        left = share * max(0, self.count - 1) - self.zeros
        if left < 0:
            return 0.0
        found = None
        for bucket, count in sorted(self.counts.items()):
            found = bucket
            left -= count
            if left < 0:
                break
        # The middle of a bucket, so that what is off is at most half of its width either way.
        return 0.0 if found is None else 2.0 * GROWTH**found / (1.0 + GROWTH)
