"""How sure a measured score is: intervals for shares and for paired differences, and corrections for many comparisons.

Scores are numbers from 0 to 1, one an item, in the same order for everything that is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from chorus.core.errors import InvalidRequestError

_RESAMPLES = 10_000
_BLOCK = 1_000
_STEPS = 60  # of a bisection: past a float's precision
_BINS = 10


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """In per cent, or in points of them."""
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def clopper_pearson(hits: int, count: int, *, level: float = 0.95) -> Interval:
    """The exact interval of a share (C. Clopper and E. Pearson, 1934). Raises `InvalidRequestError` without items."""
    if not 0 <= hits <= count or count == 0:
        raise InvalidRequestError("scores", f"{hits} of {count} is no share; there must be at least one item")
    tail = (1.0 - level) / 2.0
    low = 0.0 if hits == 0 else _where(lambda share: 1.0 - binomial_below(hits - 1, count, share) >= tail)
    high = 1.0 if hits == count else _where(lambda share: binomial_below(hits, count, share) <= tail)
    return Interval(hits / count, low, high)


def binomial_below(most: int, count: int, share: float) -> float:
    """The chance of at most `most` hits among `count`, each with the chance `share`."""
    if share <= 0.0:
        return 1.0
    if share >= 1.0:
        return 1.0 if most >= count else 0.0
    yes, no = math.log(share), math.log1p(-share)
    whole = math.lgamma(count + 1)
    terms = (
        whole - math.lgamma(hits + 1) - math.lgamma(count - hits + 1) + hits * yes + (count - hits) * no
        for hits in range(most + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(map(math.exp, terms)))


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], *, level: float = 0.95, strata: Sequence[str] = (), seed: int = 0
) -> Interval:
    """How much better `ours` is than `theirs` on the same items: percentile bootstrap over items.

    With `strata` (one name an item) as many items of each are drawn as there are. Raises `InvalidRequestError` where
    the scores aren't pairs.
    """
    if len(ours) != len(theirs) or not ours or (strata and len(strata) != len(ours)):
        raise InvalidRequestError("scores", f"{len(ours)} and {len(theirs)} scores are no pairs")
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    names = np.asarray(strata or [""] * len(ours))
    generator = np.random.default_rng(seed)
    totals = np.zeros(_RESAMPLES)
    for name in np.unique(names):
        part = differences[names == name]
        for at in range(0, _RESAMPLES, _BLOCK):
            totals[at : at + _BLOCK] += _resampled(part, generator)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(totals / len(differences), [tail, 1.0 - tail])
    return Interval(float(differences.mean()), float(low), float(high))


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """The exact two-sided p-value that neither of two is right more often (Q. McNemar, 1947)."""
    wins = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    losses = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    return min(1.0, 2.0 * binomial_below(min(wins, losses), wins + losses, 0.5))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for there being several (S. Holm, 1979), by name."""
    adjusted: dict[str, float] = {}
    worst = 0.0
    for rank, (name, value) in enumerate(sorted(p_values.items(), key=lambda named: (named[1], named[0]))):
        worst = max(worst, min(1.0, (len(p_values) - rank) * value))
        adjusted[name] = worst
    return adjusted


def not_worse(
    ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]], *, margin: float, level: float = 0.95
) -> dict[str, bool]:
    """Of each task, whether ours is less than `margin` worse, all claims together at `level` (Holm's steps).

    The task with the strongest evidence is held to the strictest level, the next one to a less strict one, until one
    fails; those after it fail with it.
    """
    p_values = {}
    for name, scores in ours.items():
        differences = np.asarray(scores, dtype=np.float64) - np.asarray(theirs[name], dtype=np.float64)
        error = float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        distance = float(differences.mean()) + margin
        p_values[name] = NormalDist().cdf(-distance / error) if error else float(distance <= 0)
    alpha = (1.0 - level) / 2.0
    return {name: value < alpha for name, value in holm(p_values).items()}


def calibration_error(confidences: Sequence[float], right: Sequence[bool], *, bins: int = _BINS) -> float:
    """The expected calibration error: how far confidence and share of right answers are apart, in bins of equal width.

    C. Guo et al., 2017, arXiv 1706.04599. Raises `InvalidRequestError` where there are no pairs.
    """
    if len(confidences) != len(right) or not confidences:
        raise InvalidRequestError("scores", f"{len(confidences)} confidences and {len(right)} scores are no pairs")
    values, hits = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    places = np.minimum((values * bins).astype(int), bins - 1)
    gaps = [abs(float((values - hits)[places == place].sum())) for place in range(bins)]
    return sum(gaps) / len(values)


def _where(holds: Callable[[float], bool]) -> float:
    """The least share from which on something holds."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _resampled(values: npt.NDArray[np.float64], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Sums of as many values as there are, drawn with replacement: one draw of a block after the other."""
    # Few values differ (two scores' differences are -1, 0 or 1): drawing how often each comes is quicker by far.
    distinct, counts = np.unique(values, return_counts=True)
    drawn = generator.multinomial(len(values), counts / len(values), size=_BLOCK)
    return np.asarray(drawn @ distinct, dtype=np.float64)
