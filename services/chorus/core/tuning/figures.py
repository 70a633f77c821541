"""From measurements to figures: medians with their spread, and what a change of perplexity is worth.

Machines drift: they warm up, throttle, and other programs come and go. So two variants are measured in turns, and it is
the ratios within each turn that are compared. Perplexities are compared in pairs as well: over the same text, block by
block, so that what makes a passage hard for every variant cancels out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of several measurements, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the distance of highest and lowest, relative to the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def summarize(samples: Sequence[float]) -> Figure:
    """The figure of `samples`. Raises ValueError for none."""
    if not samples:
        raise ValueError("nothing was measured")
    return Figure(statistics.median(samples), min(samples), max(samples))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """By how much `ours` are higher than `theirs`, measured in turns: the figure of the ratios within each turn."""
    return summarize([a / max(b, 1e-9) for a, b in zip(ours, theirs, strict=True)])


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a variant predicts a text: the mean negative log-likelihood per token, in nats, of each block of it."""

    blocks: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """e to the mean; the lower, the better. Raises ValueError without blocks."""
        return math.exp(statistics.fmean(self.blocks))


@dataclass(frozen=True, slots=True)
class Loss:
    """By how much a perplexity is worse than another, relative to it (0.01 is 1%), and the standard error of that."""

    change: float
    error: float

    def is_nothing(self, tolerance: float) -> bool:
        """Whether it is within `tolerance`, even if it is two standard errors worse than it seems."""
        return self.change + 2 * self.error <= tolerance


def loss_of(ours: Quality, reference: Quality) -> Loss:
    """What `ours` loses against `reference`, measured over the same text. Raises ValueError where it wasn't."""
    if len(ours.blocks) != len(reference.blocks) or not ours.blocks:
        raise ValueError("the two were not measured over the same text")
    differences = [a - b for a, b in zip(ours.blocks, reference.blocks, strict=True)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    change = math.expm1(min(mean, 50.0))  # e to the 50 says it all, and more would overflow
    return Loss(change, error * (1 + change) if any(differences) else 0.0)
