"""Learns from a recording what `core/ensemble/learned.py` holds. Give it the tuning half alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chorus.core.ensemble.weighing import ANY_MODEL, FEATURES, Learned, Weights, features, words_of
from chorus.eval.scoring import is_right

Floats = npt.NDArray[np.float64]
_OFTEN = 0.05  # of a kind's questions: words that are rarer tell of single questions
_ROUNDS = 30
# Standard errors by which a model has to be better at a kind than the one that is best over all.
_CLEARLY = 2.0


class Fitter:
    """A recording as numbers, read once. `prompts` by item id. A family of items is a kind of question."""

    def __init__(self, lines: Sequence[Mapping[str, Any]], prompts: Mapping[str, str]) -> None:
        self._families = np.array([line["family"] for line in lines])
        self._models = list(lines[0]["outputs"])
        self._words = [words_of(prompts[line["id"]]) for line in lines]
        self._told = {model: [_told(line, model) for line in lines] for model in self._models}

    def fit(self, *, penalty: float, again: float, margin: float, without: str = "") -> Learned:
        """What there is to learn; `penalty` keeps what a kind adds small, `without` leaves a family out. `again` and
        `margin` are `Learned`'s."""
        places = [place for place, family in enumerate(self._families) if family != without]
        kinds = {str(kind): self._kind(kind) for kind in np.unique(self._families) if kind != without}
        weights = {model: self._one(places, [model], list(kinds), penalty) for model in self._models}
        weights[ANY_MODEL] = self._one(places, self._models, [], penalty)
        return Learned(kinds, weights, again, self._best(places), margin)

    def _best(self, places: Sequence[int]) -> dict[str, str]:
        """The best model of each kind: that which is best over all, unless another is clearly better there."""
        right = {model: np.array([told[place][1][0] for place in places]) for model, told in self._told.items()}
        families = self._families[list(places)]
        over_all = max(self._models, key=lambda model: float(right[model].mean()))
        best = {}
        for kind in map(str, np.unique(families)):
            gains = {model: (right[model] - right[over_all])[families == kind] for model in self._models}
            clear = [model for model in self._models if gains[model].mean() > _CLEARLY * _error(gains[model])]
            best[kind] = max(clear, key=lambda model, own=gains: float(own[model].mean()), default=over_all)
        return best

    def _kind(self, kind: str) -> frozenset[str]:
        own = [self._words[place] for place in np.flatnonzero(self._families == kind)]
        often = Counter(word for words in own for word in words)
        return frozenset(word for word, count in often.items() if count >= max(2, _OFTEN * len(own)))

    def _one(self, places: Sequence[int], models: Sequence[str], kinds: Sequence[str], penalty: float) -> Weights:
        told = [self._told[model][place] for model in models for place in places]
        counts = np.concatenate([weights for _, _, weights in told])
        right = np.concatenate([scores for _, scores, _ in told])
        of_kind = np.array([[float(self._families[place] == kind) for kind in kinds] for place in places])
        lengths = [len(scores) for _, scores, _ in told]
        rows = np.hstack(
            [
                np.concatenate([own for own, _, _ in told]),
                np.repeat(np.tile(of_kind, (len(models), 1)), lengths, axis=0),
            ]
        )
        numbers = [round(float(value), 3) for value in _logistic(rows, right, counts, penalty)]
        return Weights(tuple(numbers[: len(FEATURES)]), dict(zip(kinds, numbers[len(FEATURES) :], strict=True)))


def _error(values: Floats) -> float:
    """The standard error of a mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _told(line: Mapping[str, Any], model: str) -> tuple[Floats, Floats, Floats]:
    """The features of a model's answers to one item, whether each is right, and what each counts."""
    told = line["outputs"][model]
    outputs = [told["greedy"], *told["samples"]]
    rows = np.array([features([*output["logprobs"], output["end"]]) for output in outputs])
    right = np.array([float(is_right(output["text"], line["answers"])) for output in outputs])
    counts = np.full(len(outputs), 1.0 / len(outputs))
    counts[0] = 1.0
    return rows, right, counts


def _logistic(rows: Floats, right: Floats, counts: Floats, penalty: float) -> Floats:
    """Logistic regression with a ridge on all but the bias, by Newton's method."""
    ridge = np.full(rows.shape[1], penalty)
    ridge[0], ridge[1 : len(FEATURES)] = 1e-6, 0.1
    found = np.zeros(rows.shape[1])
    for _ in range(_ROUNDS):
        chance = 1.0 / (1.0 + np.exp(-np.clip(rows @ found, -30, 30)))
        slope = rows.T @ (counts * (chance - right)) + ridge * found
        bend = (rows * (counts * chance * (1.0 - chance))[:, None]).T @ rows + np.diag(ridge)
        step = np.linalg.solve(bend, slope)
        found -= step
        if float(np.abs(step).max()) < 1e-7:
            break
    return found
