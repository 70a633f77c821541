"""The nearest of many vectors: the signs of their components first, as bits, then the cosines of the few that are left.

A scan of bits, not an index that has to be built and kept beside the entries: 100,000 vectors of 384 components are 4.8
MB, scanned in about a millisecond. A vector that nearly has the same direction nearly has the same signs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint64]
_GROWTH = 2
_PICKED = 4
_SAMPLED = 64
_FARTHEST = np.iinfo(np.uint16).max  # further than any vector is: they have fewer components


def signs(vector: Vector) -> Bits:
    """The signs of a vector's components, 64 to a word; the last word is filled up with zeros."""
    packed = np.packbits(vector > 0)
    return np.pad(packed, (0, -len(packed) % 8)).view(np.uint64)


class Nearest:
    """Vectors by number, each in a group; only those of one group are compared. All are of one length."""

    def __init__(self, words: int) -> None:
        """`words` as `signs` makes them."""
        self._bits = np.zeros(
            (words, 64), np.uint64
        )  # a row for each word, so that a scan goes straight through memory
        self._groups = np.zeros(64, np.int64)
        self._numbers = np.zeros(64, np.int64)
        self._rows: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def words(self) -> int:
        """Of each vector."""
        return int(self._bits.shape[0])

    def add(self, number: int, group: int, bits: Bits) -> None:
        """Adds a vector, or replaces it."""
        row = self._rows.setdefault(number, len(self._rows))
        if row == len(self._numbers):
            self._grow()
        self._bits[:, row], self._groups[row], self._numbers[row] = bits, group, number

    def add_all(self, numbers: Sequence[int], groups: Sequence[int], bits: Bits) -> None:
        """Adds vectors whose numbers are not there yet, and leaves the others; `bits` has shape (vectors, words)."""
        new = [place for place, number in enumerate(numbers) if number not in self._rows]
        first = len(self._rows)
        rows = slice(first, first + len(new))
        while rows.stop > len(self._numbers):
            self._grow()
        self._bits[:, rows] = bits[new].T
        self._groups[rows] = [groups[place] for place in new]
        self._numbers[rows] = [numbers[place] for place in new]
        self._rows.update((numbers[place], first + row) for row, place in enumerate(new))

    def _grow(self) -> None:
        self._bits = np.concatenate([self._bits] * _GROWTH, axis=1)
        self._groups = np.concatenate([self._groups] * _GROWTH)
        self._numbers = np.concatenate([self._numbers] * _GROWTH)

    def remove(self, number: int) -> None:
        """Removes a vector, if it is there; the last one takes its row."""
        row = self._rows.pop(number, None)
        last = len(self._rows)
        if row is None or row == last:
            return
        moved = int(self._numbers[last])
        self._bits[:, row], self._groups[row], self._numbers[row] = self._bits[:, last], self._groups[last], moved
        self._rows[moved] = row

    def near(self, group: int, bits: Bits, limit: int) -> list[int]:
        """The numbers of at most `limit` vectors of the group, those with the fewest other signs first."""
        count = len(self._rows)
        theirs = self._groups[:count] == group
        rows = np.flatnonzero(theirs)
        if not len(rows):
            return []
        # Straight through memory is faster than picking, unless only few are picked.
        whole = _PICKED * len(rows) > count
        apart = np.zeros(count if whole else len(rows), np.uint16)
        for word, asked in zip(self._bits, bits, strict=True):
            apart += np.bitwise_count((word[:count] if whole else word[rows]) ^ asked)
        if whole and len(rows) < count:
            apart[~theirs] = _FARTHEST
        few = _smallest(apart, min(limit, len(rows)))
        numbers: list[int] = self._numbers[few if whole else rows[few]].tolist()
        return numbers


def _smallest(apart: npt.NDArray[np.uint16], limit: int) -> npt.NDArray[np.intp]:
    """Where the `limit` smallest are, the smallest first; earlier places before later ones.

    A partition of all of them takes as long as the scan did. So some are sampled, to guess what the smallest are below.
    """
    if len(apart) <= _SAMPLED * limit:
        few = np.arange(len(apart))
    else:
        sample = np.sort(apart[::_SAMPLED])
        below = int(sample[min(len(sample) - 1, 2 * limit // _SAMPLED + 2)])
        few = np.flatnonzero(apart <= below)
        while len(few) < limit:
            below = 2 * below + 1
            few = np.flatnonzero(apart <= below)
    return few[np.argsort(apart[few], kind="stable")[:limit]]
