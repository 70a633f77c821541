"""Learns the gate's weights from the tuning half, and nothing else. From the repository's root:

    python -m benchmarks.semantic.learn > services/chorus/core/cache/gate.json

A logistic regression with L2 and no positive weights: a difference may speak against a pair, never for it. So a kind of
difference that the tuning half has little of can't come out as harmless as long as it counts among all differences.
The threshold is the least at which, with each template left out of the learning in its turn, no near miss of it would
have been accepted; then half of the way from there to certainty is given to doubt.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import numpy.typing as npt
from benchmarks.semantic import questions_tuning
from benchmarks.semantic.template import Pair, pairs
from benchmarks.semantic.vectors import cosines

from chorus.core.cache.comparing import FEATURES
from chorus.core.cache.gate import Gate, Weights
from chorus.store.gate import read_lexicon

SEED = 20261126
FILLINGS = 5
_STEPS, _RATE, _L2 = 4000, 0.3, 0.003
Vector = npt.NDArray[np.float64]


def fit(features: Vector, same: Vector) -> tuple[float, Vector]:
    """Bias and weights, by projected gradient descent; both classes weigh alike."""
    bias, weights = 0.0, np.zeros(features.shape[1])
    share = np.where(same > 0, 0.5 / same.sum(), 0.5 / (1 - same).sum())
    for _ in range(_STEPS):
        off = (1.0 / (1.0 + np.exp(-(bias + features @ weights))) - same) * share
        bias -= _RATE * off.sum()
        weights = np.minimum(0.0, weights - _RATE * (features.T @ off + _L2 * weights))
    return bias, weights


def threshold(found: list[Pair], features: Vector, same: Vector) -> float:
    """See above."""
    worst = 0.5
    templates = np.array([pair.template for pair in found])
    for name in sorted(set(templates)):
        out = templates == name
        bias, weights = fit(features[~out], same[~out])
        near = features[out & (same == 0)]
        worst = max(worst, float((1.0 / (1.0 + np.exp(-(bias + near @ weights)))).max()))
    return (1.0 + worst) / 2.0


def main() -> int:
    """Returns 0."""
    found = pairs(questions_tuning.TEMPLATES, fillings=FILLINGS, seed=SEED)
    gate = Gate(read_lexicon(), Weights(0.0, (0.0,) * len(FEATURES), 1.0))
    near = cosines(found)
    rows = np.array([gate.features(p.first, p.second, c) for p, c in zip(found, near, strict=True)])
    same = np.array([float(pair.same) for pair in found])
    bias, weights = fit(rows, same)
    least = threshold(found, rows, same)
    print(
        json.dumps(
            {
                "made_by": "python -m benchmarks.semantic.learn",
                "learned_from": f"{int(same.sum())} paraphrases and {int((1 - same).sum())} near misses, seed {SEED}",
                "bias": round(bias, 4),
                "weights": {name: round(float(weight), 4) for name, weight in zip(FEATURES, weights, strict=True)},
                "threshold": round(least, 4),
            },
            indent=2,
        )
    )
    accepted = 1.0 / (1.0 + np.exp(-(bias + rows @ weights))) >= least
    told = [f"{accepted[same == kind].mean():.1%} of {name}" for kind, name in ((1, "paraphrases"), (0, "near misses"))]
    print(f"tuning half: accepted {', '.join(told)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
