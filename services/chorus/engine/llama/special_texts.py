"""Where a long text can be cut so that llama.cpp makes of its pieces the very tokens that it makes of the whole.

llama.cpp begins with special tokens: it looks for the text of each, the longest first, from left to right in whatever
is not taken yet, and reads what is left between them bit by bit, each by itself. For each one that it finds it walks
along all before it, so that 20,000 take a second and 200,000 minutes. Between two of them nothing is shared, so a text
may be cut before any that is certain to be found.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt

_BETWEEN_CUTS = 128  # special tokens; a thousand take llama.cpp some milliseconds
_LONGEST = 256  # bytes of a text to be cut before
_SLAB = 1 << 20  # bytes looked at together
_SPACE = b" \t\n\v\f\r"  # what llama.cpp lets such tokens swallow


class SpecialTexts:
    """The texts that one vocabulary reads as special tokens."""

    def __init__(self, texts: Collection[bytes], *, strip: bool = False, strip_left: Collection[bytes] = ()) -> None:
        """`strip`: some of them swallow white space beside them; `strip_left`: these swallow that before them."""
        self._inner = np.zeros(1 << 16, dtype=np.bool_)  # pairs of bytes that stand together in some text
        for text in texts:
            for first, second in itertools.pairwise(text):
                self._inner[first << 8 | second] = True
        # White space may be swallowed, so that it is not found, and a cut would keep it from being swallowed.
        found = {text for text in texts if text and text not in strip_left and not (strip and _has_space_outside(text))}
        self._texts = frozenset(text for text in found if len(text) <= _LONGEST)
        self._fits = np.zeros((256, _LONGEST + 1), dtype=np.bool_)  # first byte and length of some text
        for text in self._texts:
            self._fits[text[0], len(text)] = True
        self._runs: dict[int, int] = {}  # by a byte, the longest text that is this byte again and again
        for text in sorted(texts, key=len):
            if text and text.count(text[:1]) == len(text):
                self._runs[text[0]] = len(text) if text in self._texts else 0
        self._repeats = np.zeros(256, dtype=np.bool_)
        self._repeats[list(self._runs)] = True

    def cuts(self, data: bytes) -> list[int]:
        """Places in the text to cut it at, in order, none at its beginning; none at all where few tokens are special.

        Where the texts of special tokens run into each other in a way that is not understood here, nothing is cut.
        """
        found: list[int] = []
        count = 0
        for start, step, end in self._certain(data):
            # the first one of these to be cut before, for there to be so many between it and the last cut
            for place in range(start + max(_BETWEEN_CUTS - count, 0) * step, end, _BETWEEN_CUTS * step):
                found.append(place)
                count = -((place - start) // step)
            count += (end - start + step - 1) // step
        return found

    def _certain(self, data: bytes) -> Iterator[tuple[int, int, int]]:
        """Tokens that are certain to be found, as a range of the places where they begin.

        Where two bytes meet that stand together in no special text, no special token reaches over. So what lies between
        two such places is read by itself, and if it is a special text, as that: nothing longer fits. If it is one byte
        again and again, it is read as the longest text of that byte for as long as there is room for it.
        """
        for starts, ends in self._regions(data):
            lengths = ends - starts
            firsts = np.frombuffer(data, dtype=np.uint8)[starts]
            likely = self._fits[firsts, np.minimum(lengths, _LONGEST)] & (lengths <= _LONGEST)
            likely |= self._repeats[firsts] & (lengths > 1)
            for start, end in zip(starts[likely].tolist(), ends[likely].tolist(), strict=True):
                if end - start <= _LONGEST and data[start:end] in self._texts:
                    yield start, end - start, end
                    continue
                most = self._runs.get(data[start], 0)
                if 0 < most < end - start and data.count(data[start], start, end) == end - start:
                    yield start, most, end - (end - start) % most

    def _regions(self, data: bytes) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Where each part begins and ends that no special token reaches over, some at a time."""
        every = np.frombuffer(data, dtype=np.uint8)
        begun = 0
        for slab in range(0, len(data), _SLAB):
            part = every[slab : slab + _SLAB + 1]
            pairs = part[:-1].astype(np.uint16) << 8 | part[1:]
            bounds = np.flatnonzero(~self._inner[pairs]) + (slab + 1)
            if slab + _SLAB >= len(data):
                bounds = np.append(bounds, len(data))
            if len(bounds):
                starts = np.concatenate(([begun], bounds[:-1]))
                begun = int(bounds[-1])
                yield starts, bounds


def _has_space_outside(text: bytes) -> bool:
    return text[:1] in _SPACE or text[-1:] in _SPACE
