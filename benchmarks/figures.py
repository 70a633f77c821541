"""What is made of measured values: percentiles, and geometric means of ratios with their confidence."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

_RESAMPLES = 4000


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed; nan of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


@dataclass(frozen=True)
class Mean:
    """A geometric mean with its 95% confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def geometric_mean(cells: Sequence[Sequence[float]]) -> Mean:
    """The mean over cells of each cell's mean over its ratios.

    The interval is a percentile bootstrap that resamples pairs within each cell, so cells keep their weight
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). The same values give the same interval.
    """
    logs = [[math.log(ratio) for ratio in cell] for cell in cells]
    draw = random.Random(0)
    means = sorted(
        sum(sum(draw.choices(cell, k=len(cell))) / len(cell) for cell in logs) / len(logs) for _ in range(_RESAMPLES)
    )
    middle = sum(sum(cell) / len(cell) for cell in logs) / len(logs)
    low, high = means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES)]
    return Mean(math.exp(middle), math.exp(low), math.exp(high))


@dataclass(frozen=True)
class Bar:
    """Something that a benchmark must show, and whether it did."""

    what: str
    passed: bool


def verdict(bars: Sequence[Bar]) -> int:
    """Prints the bars; returns an exit status, 1 if any was missed."""
    print()
    for bar in bars:
        print(f"- {'met' if bar.passed else 'MISSED'}: {bar.what}")
    return 0 if all(bar.passed for bar in bars) else 1
