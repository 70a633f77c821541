"""Finding what matters in a row of logits, at the price of reading it a few times.

Vocabularies have up to 262,144 tokens and this runs for every token, so nothing here sorts a row where it can be
helped. Buffers of a row's size are kept for each thread: a fresh one would cost more in page faults than the work.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.uint32]  # of bits, the lowest first: shape ((vocabulary + 31) // 32,)

_ROWS = 32
# For each byte of a mask, the bounds it sets to eight logits.
_BOUNDS = np.where((np.arange(256)[:, None] >> np.arange(8)) & 1, np.float32(np.inf), np.float32(-np.inf))


class Buffers:
    """Room for one row: a changed one in `values`, its weights in `weights`, `spare` and `flags` for what comes up."""

    def __init__(self, size: int) -> None:
        self.values: FloatArray = np.empty(size, dtype=np.float32)
        self.weights: FloatArray = np.empty(size, dtype=np.float32)
        self.spare: FloatArray = np.empty(size, dtype=np.float32)
        self.flags = np.empty(size, dtype=np.bool_)
        self._bounds: FloatArray = np.empty((-(-size // 32) * 4, 8), dtype=np.float32)

    def masked(self, row: FloatArray, mask: Mask) -> FloatArray:
        """The row in `values`, with minus infinity for every token whose bit is not set."""
        # Twenty times as fast as a `where` over the row: one look-up for eight tokens, then a minimum.
        _BOUNDS.take(mask.view(np.uint8), axis=0, out=self._bounds, mode="clip")
        return np.minimum(row, self._bounds.reshape(-1)[: row.size], out=self.values)


class _Kept(threading.local):
    def __init__(self) -> None:
        self.by_size: dict[int, Buffers] = {}


_kept = _Kept()


def buffers(size: int) -> Buffers:
    """This thread's buffers for rows of `size`."""
    found = _kept.by_size.get(size)
    if found is None:
        found = _kept.by_size[size] = Buffers(size)
    return found


def above(row: FloatArray, bound: float) -> IdArray:
    """The indexes, in order, of all values of at least `bound`."""
    return np.greater_equal(row, np.float32(bound), out=buffers(row.size).flags).nonzero()[0]


def by_value(row: FloatArray, ids: IdArray) -> tuple[IdArray, FloatArray]:
    """Ids, given in order, and their values: the largest first, and the lower id first among equals."""
    values = row[ids]
    order = (-values).argsort(kind="stable")
    return ids[order], values[order]


def largest(row: FloatArray, count: int) -> tuple[IdArray, FloatArray]:
    """The ids of the `count` largest values and these, the largest first and the lower id first among equals.

    Fewer where the others are minus infinity, unless all are.
    """
    count = min(count, row.size)
    if not count:
        return np.empty(0, dtype=np.int64), row[:0]
    if count * 4 >= row.size:
        ids = np.argsort(-row, kind="stable")[:count]
        return ids, row[ids]
    ids, values = by_value(row, _candidates(row, count))
    return ids[:count], values[:count]


def _candidates(row: FloatArray, count: int) -> IdArray:
    """The indexes, in order, of the `count` largest values and some others, all that equal one of them included.

    The row is read as a table; the largest values lie in the columns with the largest maxima, and the least of these
    maxima bounds the values from below. So only a thousandth of a row is looked at twice. (To guess the bound from
    the row before saves nothing: the 40th largest logit lies 3 to 14 below the largest, row by row.)
    """
    width = row.size // _ROWS
    by_columns = count * 2 < width
    if by_columns:
        table = row[: width * _ROWS].reshape(_ROWS, width)
        maxima = np.maximum.reduce(table, axis=0)
        bound = np.partition(maxima, width - count)[width - count]
    else:
        bound = np.partition(row, row.size - count)[row.size - count]
    if bound == -np.inf and row.max() > bound:
        # What a form forbids, often all but a few, is no candidate: to sort it would take longer than a step.
        allowed: IdArray = np.greater(row, bound, out=buffers(row.size).flags).nonzero()[0]
        return allowed
    if not by_columns:
        found = above(row, float(bound))
    else:
        columns = (maxima >= bound).nonzero()[0]
        lines, places = (table.take(columns, axis=1) >= bound).nonzero()
        found = lines * width + columns[places]
        if width * _ROWS < row.size:
            found = np.concatenate((found, width * _ROWS + (row[width * _ROWS :] >= bound).nonzero()[0]))
    return found if found.size >= count else np.arange(row.size)  # fewer where some logit is no number


def log_normalizer(row: FloatArray) -> float:
    """What to subtract from a logit to make it a log-probability (natural)."""
    top = row.max()
    return float(top) + math.log(weight_of(row, top, buffers(row.size).weights))


def weight_of(row: FloatArray, top: np.float32, weights: FloatArray) -> np.float32:
    """The sum of the `weights` that this computes: e to the power of each value less `top`."""
    np.subtract(row, top, out=weights)
    np.exp(weights, out=weights)
    total: np.float32 = weights.sum()  # pairwise, so about as exact as its numbers
    return total


def typical(row: FloatArray, mass: float, room: Buffers) -> IdArray:
    """The indexes, in order, of the locally typical tokens: those whose surprise is nearest to the expected one.

    Together they have at least `mass`. (Meister et al., Locally Typical Sampling, 2022.) Only tokens within some
    distance of the expected surprise are sorted, and the distance grows until they have the mass.
    """
    total = float(weight_of(row, row.max(), room.weights))
    # A token of the mean logit is exactly as surprising as is expected. A forbidden one has no part in the mean.
    np.maximum(row, np.float32(-1e30), out=room.spare)
    mean = np.float32(float(np.dot(room.weights, room.spare)) / total)
    away = np.abs(np.subtract(row, mean, out=room.spare), out=room.spare)
    distance = 1.0
    while True:
        found = np.less_equal(away, np.float32(distance), out=room.flags).nonzero()[0]
        chances = room.weights[found].astype(np.float64) / total
        if chances.sum() >= mass or distance > 1e6:
            break
        distance *= 2.0
    order = away[found].argsort(kind="stable")
    count = int(chances[order].cumsum().searchsorted(mass)) + 1
    return np.sort(found[order[:count]])
