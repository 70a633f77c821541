"""Drawing the next token from its logits.

The steps, in llama.cpp's order: the mask of a constraint; logit bias; repetition, frequency and presence penalties over
the last tokens of prompt and answer; DRY; top-k; locally typical; top-p; min-p; XTC; temperature; the draw. Each works
on what the one before it left and leaves at least one token. Temperature 0 (or under 0.0001) takes the likeliest token
after mask, bias, penalties and DRY.

A draw is a pure function of (seed, choice, index) and of the tokens before it, so a stream that goes on elsewhere draws
as it would have here.
"""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from chorus.core.errors import EngineError
from chorus.core.generation import Sampling
from chorus.engine.llama.dry import RepeatPenalty
from chorus.engine.llama.ranking import (
    Buffers,
    FloatArray,
    IdArray,
    Mask,
    above,
    buffers,
    by_value,
    largest,
    typical,
    weight_of,
)

_FORBIDS = -100.0
_BLOCK = 128
_FARTHEST = 120.0  # below the likeliest logit: no token so far down has a weight
# Below this a gap of a hundredth between two logits decides as surely as 0 does, and quotients would overflow.
_COLDEST = 1e-4
_DRAW, _EXCLUDE = b"chorus.draw", b"chorus.xtc"  # streams of numbers that know nothing of each other

Doubles = npt.NDArray[np.float64]


def uniform(seed: int, choice: int, index: int, stream: bytes = _DRAW) -> float:
    """A number in [0, 1) that follows from its arguments alone. `seed` below 2**64, the others below 2**32."""
    digest = hashlib.blake2b(struct.pack("<QII", seed, choice, index), digest_size=8, person=stream).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def no_pieces(_: int) -> bytes:
    """The bytes of tokens where nobody knows them: then no sequence breaker is ever met."""
    return b""


class Sampler:
    """Draws the tokens of one choice."""

    def __init__(
        self,
        sampling: Sampling,
        *,
        seed: int,
        choice: int,
        history: Iterable[int],
        piece_of: Callable[[int], bytes] = no_pieces,
    ) -> None:
        """`history`: prompt and delivered tokens, at which penalties and DRY look. Ids in the logit bias must exist.

        `piece_of` gives a token's bytes, in which DRY looks for its sequence breakers.
        """
        self._sampling = sampling
        self._seed = seed
        self._choice = choice
        self._bias_ids = np.fromiter(sampling.logit_bias.keys(), dtype=np.int64, count=len(sampling.logit_bias))
        self._biases = np.array(
            [-np.inf if bias <= _FORBIDS else bias for bias in sampling.logit_bias.values()], dtype=np.float32
        )
        self._repeats: RepeatPenalty | None = None
        if sampling.dry is not None and sampling.dry.multiplier > 0.0 and sampling.dry.window != 0:
            history = list(history)
            self._repeats = RepeatPenalty(sampling.dry, history, piece_of)
        self._window: deque[int] | None = None
        self._seen: Counter[int] = Counter()
        if sampling.penalizes:
            tokens = list(history)
            recent = tokens[max(len(tokens) - sampling.penalty_window, 0) :]
            self._window, self._seen = deque(recent), Counter(recent)
        self._changes_row = bool(self._bias_ids.size) or sampling.penalizes or self._repeats is not None
        self._cuts = bool(sampling.top_k) or sampling.typical_p < 1.0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
        self._reach = 6.0  # how far below the likeliest top-p went lately: a guess, which is put right

    def accept(self, token_id: int) -> None:
        """The token was drawn: penalties and DRY will see it."""
        if self._window is not None:
            self._count(token_id)
        if self._repeats is not None:
            self._repeats.accept(token_id)

    def draw(self, row: FloatArray, index: int, mask: Mask | None = None) -> int:
        """The token at `index` of this choice's answer, among those whose bits are set in `mask`.

        Raises `EngineError` where the model gave no usable logits.
        """
        sampling = self._sampling
        if mask is not None:
            row = buffers(row.size).masked(row, mask)
        if self._changes_row:
            row = self._changed(row)
        if sampling.temperature < _COLDEST:
            best = int(row.argmax())
            _check(row[best])
            return best
        acts = sampling.xtc is not None and self._xtc_acts(index)
        if not self._cuts:
            return self._draw_of_all(self._less_excluded(row) if acts else row, index)
        ids, values, total = self._narrow(row)
        offsets = np.subtract(values, values[0], dtype=np.float64)
        weights = np.exp(offsets)
        count = ids.size
        if sampling.top_p < 1.0:
            sums = weights.cumsum()
            count = int(sums.searchsorted(sampling.top_p * (total or sums[-1]))) + 1
        if sampling.min_p > 0.0:
            count = min(count, int(np.count_nonzero(weights >= sampling.min_p)))
        count = max(1, min(count, ids.size))
        first = self._excluded(weights[:count]) if acts else 0
        sums = np.exp((offsets[first:count] - offsets[first]) / sampling.temperature).cumsum()
        place = int(sums.searchsorted(uniform(self._seed, self._choice, index) * sums[-1], side="right"))
        place = min(first + place, count - 1)
        while offsets[place] == -np.inf:  # rounding led past the last token that is not forbidden
            place -= 1
        return int(ids[place])

    def _narrow(self, row: FloatArray) -> tuple[IdArray, FloatArray, float]:
        """Ids and logits, the likeliest first, that top-k and typical leave, less what a later step cuts in any case.

        Then the weight of what they leave, where the likeliest's is 1; 0 says that it is the weight of these ids.
        """
        sampling = self._sampling
        if sampling.top_k:
            ids, values = largest(row, sampling.top_k)
            _check(values[0])
            if sampling.typical_p < 1.0:
                kept = typical(values, sampling.typical_p, Buffers(values.size))
                ids, values = ids[kept], values[kept]
            return ids, values, 0.0
        top = row.max()
        _check(top)
        if sampling.typical_p < 1.0:
            return (*by_value(row, typical(row, sampling.typical_p, buffers(row.size))), 0.0)
        total = float(weight_of(row, top, buffers(row.size).weights)) if sampling.top_p < 1.0 else 0.0
        if sampling.min_p > 0.0:
            return (*by_value(row, above(row, float(top) + math.log(sampling.min_p) - 1e-3)), total)
        return (*self._most_of(row, top, total * sampling.top_p), total)

    def _count(self, token_id: int) -> None:
        window = self._window
        assert window is not None
        window.append(token_id)
        self._seen[token_id] += 1
        if len(window) > self._sampling.penalty_window:
            oldest = window.popleft()
            if self._seen[oldest] == 1:
                del self._seen[oldest]
            else:
                self._seen[oldest] -= 1

    def _changed(self, row: FloatArray) -> FloatArray:
        """A copy with bias, penalties and DRY applied, in this thread's buffer."""
        changed = buffers(row.size).values
        if changed is not row:
            np.copyto(changed, row)
        if self._bias_ids.size:
            changed[self._bias_ids] += self._biases
        if self._seen:
            sampling = self._sampling
            ids = np.fromiter(self._seen.keys(), dtype=np.int64, count=len(self._seen))
            counts = np.fromiter(self._seen.values(), dtype=np.float32, count=len(self._seen))
            logits = changed[ids]
            if sampling.repetition_penalty != 1.0:
                factor = np.float32(sampling.repetition_penalty)
                logits = np.where(logits > 0, logits / factor, logits * factor)
            logits -= counts * np.float32(sampling.frequency_penalty) + np.float32(sampling.presence_penalty)
            changed[ids] = logits
        repeated = self._repeats.penalties() if self._repeats is not None else None
        if repeated is not None:
            changed[repeated[0]] -= repeated[1]
        return changed

    def _most_of(self, row: FloatArray, top: np.float32, weight: float) -> tuple[IdArray, FloatArray]:
        """The likeliest ids that together have at least that weight, with their logits."""
        while True:
            ids, values = by_value(row, above(row, float(top) - self._reach))
            sums = np.exp(values - top, dtype=np.float64).cumsum()
            place = int(sums.searchsorted(weight))
            if place < ids.size or self._reach > _FARTHEST:  # by rounding, all of them may have too little
                break
            self._reach = self._reach * 1.5 + 1.0
        place = min(place, ids.size - 1)
        self._reach = min((float(top) - float(values[place])) * 1.25 + 0.25, _FARTHEST)
        return ids[: place + 2], values[: place + 2]

    def _draw_of_all(self, row: FloatArray, index: int) -> int:
        """Draws where nothing is cut: from the sums of blocks, then within one."""
        temperature = np.float32(self._sampling.temperature)
        room = buffers(row.size)
        top = row.max()
        _check(top)
        np.subtract(row, top, out=room.weights)
        np.divide(room.weights, temperature, out=room.weights)
        np.exp(room.weights, out=room.weights)
        blocks = np.add.reduceat(room.weights, np.arange(0, row.size, _BLOCK), dtype=np.float64).cumsum()
        target = uniform(self._seed, self._choice, index) * blocks[-1]
        block = min(int(blocks.searchsorted(target, side="right")), blocks.size - 1)
        first = block * _BLOCK
        sums = room.weights[first : first + _BLOCK].cumsum(dtype=np.float64)
        place = int(sums.searchsorted(target - (blocks[block - 1] if block else 0.0), side="right"))
        # by rounding the target may lie past the sum: then it is the last token that has a weight at all
        last = int(room.weights[first : first + _BLOCK].nonzero()[0][-1])
        return first + min(place, last)

    def _xtc_acts(self, index: int) -> bool:
        """Whether XTC excludes anything at `index`: by chance, from numbers of its own.

        The algorithm is p-e-w's (text-generation-webui #6335), as llama.cpp has it: of the tokens that have at least
        the threshold among those that are left, all but the least likely are excluded.
        """
        xtc = self._sampling.xtc
        assert xtc is not None
        if xtc.threshold > 0.5:  # there cannot be two
            return False
        return uniform(self._seed, self._choice, index, _EXCLUDE) < xtc.probability

    def _excluded(self, weights: Doubles) -> int:
        """How many of the likeliest XTC excludes, given the weights of all that is left in order."""
        xtc = self._sampling.xtc
        assert xtc is not None
        bound = max(xtc.threshold * weights.sum(), sys.float_info.min)
        return max(int(np.count_nonzero(weights >= bound)) - 1, 0)

    def _less_excluded(self, row: FloatArray) -> FloatArray:
        """A copy of a row, of which nothing was cut, without what XTC excludes, in this thread's buffer."""
        top = row.max()
        _check(top)
        xtc = self._sampling.xtc
        assert xtc is not None
        room = buffers(row.size)
        bound = max(xtc.threshold * float(weight_of(row, top, room.weights)), sys.float_info.min)
        ids, _ = by_value(row, above(row, max(float(top) + math.log(bound), -1e30)))
        if row is not room.values:
            np.copyto(room.values, row)
        room.values[ids[:-1]] = -np.inf
        return room.values


def _check(top: np.float32) -> None:
    if not math.isfinite(top):
        raise EngineError("the model gave no finite logits; its file may be damaged, or every token is forbidden")
