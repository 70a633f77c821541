"""Drawing the next token from its logits.

The steps, in this order: logit bias; repetition, frequency and presence penalties over the last tokens of prompt and
answer; top-k; locally typical; top-p; min-p; temperature; the draw. Each works on what the one before it left, as in
llama.cpp's own chain, and leaves at least one token. Temperature 0 (or under 0.0001)
takes the likeliest token after bias and penalties.

A draw is a pure function of (seed, choice, index), so a stream that goes on elsewhere draws as it would have here.
Vocabularies have up to 262,144 tokens and this runs for every token, so nothing sorts or exponentiates a whole row
where it can be helped.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from chorus.core.errors import EngineError
from chorus.core.generation import Sampling

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]

_FORBIDS = -100.0
_COLUMN = 64
# Below this a gap of a hundredth between two logits decides as surely as 0 does, and quotients would overflow.
_COLDEST = 1e-4


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1) that follows from its arguments alone. `seed` below 2**64, the others below 2**32."""
    digest = hashlib.blake2b(struct.pack("<QII", seed, choice, index), digest_size=8, person=b"chorus.draw").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def largest(row: FloatArray, count: int) -> IdArray:
    """The indexes of at least the `count` largest values (more only where some are equal), the largest first.

    The row is read as a table; the largest values lie in the columns with the largest maxima, and the least of these
    maxima bounds the values from below. So only a thousandth of a row is sorted.
    """
    size = row.size
    width = size // _COLUMN
    if count * 2 >= width:
        if count * 4 >= size:
            return np.argsort(-row, kind="stable")[:count]
        found = np.sort(np.argpartition(row, size - count)[size - count :])
        return found[np.argsort(-row[found], kind="stable")]
    table = row[: width * _COLUMN].reshape(_COLUMN, width)
    maxima = np.maximum.reduce(table, axis=0)
    columns = np.argpartition(maxima, width - count)[width - count :]
    bound = maxima[columns].min()
    values = table[:, columns]
    rows, places = np.nonzero(values >= bound)
    found = rows * width + columns[places]
    rest = row[width * _COLUMN :]
    if rest.size:
        found = np.concatenate((found, np.nonzero(rest >= bound)[0] + width * _COLUMN))
    if not found.size:  # some logit is no number
        return np.argsort(-row, kind="stable")[:count]
    found.sort()
    return found[np.argsort(-row[found], kind="stable")][:count]


def log_normalizer(row: FloatArray) -> float:
    """What to subtract from a logit to make it a log-probability (natural)."""
    top = row.max()
    return float(top) + float(np.log(np.exp(row - top).sum(dtype=np.float64)))


class Sampler:
    """Draws the tokens of one choice."""

    def __init__(self, sampling: Sampling, *, seed: int, choice: int, history: Iterable[int]) -> None:
        """`history`: prompt and delivered tokens, at which the penalties look. Ids in the logit bias must exist."""
        self._sampling = sampling
        self._seed = seed
        self._choice = choice
        self._bias_ids = np.fromiter(sampling.logit_bias.keys(), dtype=np.int64, count=len(sampling.logit_bias))
        self._biases = np.array(
            [-np.inf if bias <= _FORBIDS else bias for bias in sampling.logit_bias.values()], dtype=np.float32
        )
        self._window: deque[int] | None = None
        self._seen: Counter[int] = Counter()
        if sampling.penalizes:
            self._window = deque()
            for token_id in history:
                self.accept(token_id)
        self._changes_row = bool(self._bias_ids.size) or sampling.penalizes
        self._scratch: FloatArray | None = None

    def accept(self, token_id: int) -> None:
        """The token was drawn: the penalties will see it."""
        if self._window is None:
            return
        self._window.append(token_id)
        self._seen[token_id] += 1
        if len(self._window) > self._sampling.penalty_window:
            oldest = self._window.popleft()
            if self._seen[oldest] == 1:
                del self._seen[oldest]
            else:
                self._seen[oldest] -= 1

    def draw(self, row: FloatArray, index: int) -> int:
        """The token at `index` of this choice's answer. Raises `EngineError` where the model gave no usable logits."""
        sampling = self._sampling
        if self._changes_row:
            row = self._changed(row)
        if sampling.temperature < _COLDEST:
            best = int(row.argmax())
            _check(float(row[best]))
            return best
        if sampling.top_k:
            ids: IdArray | None = largest(row, sampling.top_k)
            assert ids is not None
            logits = row[ids].astype(np.float64)
            total = None
        else:
            ids, logits, total = self._without_top_k(row)
        if ids is None:  # nothing was cut: no need to sort
            return self._pick_unsorted(row, index)
        _check(float(logits[0]))
        weights = np.exp(logits - logits[0])
        if sampling.typical_p < 1.0:
            kept = _typical(weights, sampling.typical_p)
            ids, logits, weights, total = ids[kept], logits[kept], weights[kept], None
        count = weights.size
        if sampling.top_p < 1.0:
            sums = weights.cumsum()
            mass = sums[-1] if total is None else total
            count = int(sums.searchsorted(sampling.top_p * mass)) + 1
        if sampling.min_p > 0.0:
            count = min(count, int(np.count_nonzero(weights >= sampling.min_p * weights[0])))
        count = max(1, min(count, weights.size))
        sums = np.exp((logits[:count] - logits[0]) / sampling.temperature).cumsum()
        place = int(sums.searchsorted(uniform(self._seed, self._choice, index) * sums[-1], side="right"))
        return int(ids[min(place, count - 1)])

    def _changed(self, row: FloatArray) -> FloatArray:
        """A copy with bias and penalties applied, valid until the next call."""
        if self._scratch is None:
            self._scratch = np.empty_like(row)
        scratch = self._scratch
        np.copyto(scratch, row)
        if self._bias_ids.size:
            scratch[self._bias_ids] += self._biases
        if self._seen:
            sampling = self._sampling
            ids = np.fromiter(self._seen.keys(), dtype=np.int64, count=len(self._seen))
            counts = np.fromiter(self._seen.values(), dtype=np.float32, count=len(self._seen))
            logits = scratch[ids]
            if sampling.repetition_penalty != 1.0:
                factor = np.float32(sampling.repetition_penalty)
                logits = np.where(logits > 0, logits / factor, logits * factor)
            logits -= counts * np.float32(sampling.frequency_penalty) + np.float32(sampling.presence_penalty)
            scratch[ids] = logits
        return scratch

    def _without_top_k(self, row: FloatArray) -> tuple[IdArray | None, npt.NDArray[np.float64], float | None]:
        """Ids and logits, sorted, of all that the later steps can keep, with the weight of the whole row."""
        sampling = self._sampling
        nothing = np.empty(0)
        if sampling.typical_p < 1.0:
            ids: IdArray = np.argsort(-row, kind="stable")
            return ids, row[ids].astype(np.float64), None
        if sampling.top_p >= 1.0 and sampling.min_p <= 0.0:
            return None, nothing, None
        top = row.max()
        _check(float(top))
        total = float(np.exp(row - top).sum(dtype=np.float64))
        if sampling.min_p > 0.0:
            kept = np.nonzero(row >= top + np.log(sampling.min_p))[0]
            ids = kept[np.argsort(-row[kept], kind="stable")]
            return ids, row[ids].astype(np.float64), total
        for count in (128, 4096, row.size):
            ids = largest(row, min(count, row.size))
            logits = row[ids].astype(np.float64)
            if float(np.exp(logits - logits[0]).sum()) >= sampling.top_p * total:
                break
        return ids, logits, total

    def _pick_unsorted(self, row: FloatArray, index: int) -> int:
        top = row.max()
        _check(float(top))
        sums = np.exp((row - top) / np.float32(self._sampling.temperature)).cumsum(dtype=np.float64)
        place = int(sums.searchsorted(uniform(self._seed, self._choice, index) * sums[-1], side="right"))
        return min(place, row.size - 1)


def _typical(weights: npt.NDArray[np.float64], mass: float) -> npt.NDArray[np.int64]:
    """The places, in order, of the tokens whose surprise is nearest to the expected, together of at least `mass`."""
    probabilities = weights / weights.sum()
    with np.errstate(divide="ignore"):
        surprise = -np.log(probabilities)
    expected = float((probabilities * np.where(probabilities > 0, surprise, 0.0)).sum())
    order = np.argsort(np.abs(surprise - expected), kind="stable")
    count = int(probabilities[order].cumsum().searchsorted(mass)) + 1
    return np.sort(order[: min(count, order.size)])


def _check(top: float) -> None:
    if not np.isfinite(top):
        raise EngineError("the model gave no finite logits; its file may be damaged, or every token is forbidden")
