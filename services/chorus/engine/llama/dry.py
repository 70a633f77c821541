"""The DRY penalty: a token that would go on with a repeat is the less likely the longer the repeat is.

The algorithm is p-e-w's (text-generation-webui #5677), with the window and the sequence breakers of llama.cpp's
`llama_sampler_init_dry`. A breaker is looked for in the bytes of the tokens, so it counts however it is cut into them;
llama.cpp looks for the ways in which its own tokenizer would cut it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from chorus.core.generation import Dry

_LARGEST_LOG = 88.0  # of a float32: a penalty beyond it is infinite for all that it does to a logit
_LONGEST_BREAKER = 40  # characters, as in llama.cpp
_FIRST_ROOM = 1024


class RepeatPenalty:
    """The repeats in what one choice has said, its prompt included.

    For every place in the tokens it keeps how long a stretch that ends there is the same as the one at the very end;
    a new token makes each of them one longer or ends it, which is a few operations on whole arrays.
    """

    def __init__(self, dry: Dry, history: Iterable[int], piece_of: Callable[[int], bytes]) -> None:
        """`piece_of` gives the bytes of a token."""
        self._allowed = dry.allowed_length
        self._base = max(dry.base, 1.0)
        self._multiplier = dry.multiplier
        self._window = dry.window
        self._longest = _LARGEST_LOG / math.log(dry.base) if dry.base > 1.000001 else 0.0
        self._piece_of = piece_of
        self._breakers = tuple(
            breaker[:_LONGEST_BREAKER].encode("utf-8", "surrogatepass") for breaker in dry.sequence_breakers if breaker
        )
        self._overlap = max(map(len, self._breakers), default=1) - 1
        self._holds_breaker: dict[int, bool] = {}
        self._history: list[int] | None = list(history)
        self._ids = np.empty(0, dtype=np.int32)
        self._matches = self._ids
        self._count = 0
        self._since_breaker = 0
        self._tail = b""

    def accept(self, token_id: int) -> None:
        """One more token was said."""
        self._prepare()
        if self._count == self._ids.size:
            self._reserve(2 * self._count)
        count = self._count
        first = min(self._start(count + 1), count)
        matches = self._matches
        same = self._ids[first:count] == token_id
        if first:
            matches[first:count] = (matches[first - 1 : count - 1] + 1) * same
        elif count:
            matches[1:count] = (matches[: count - 1] + 1) * same[1:]
            matches[0] = same[0]
        self._ids[count] = token_id
        self._count += 1
        text = self._tail + self._piece_of(token_id)
        before = len(self._tail)
        ended = any(text.find(breaker, max(before - len(breaker) + 1, 0)) >= 0 for breaker in self._breakers)
        self._since_breaker = 0 if ended else self._since_breaker + 1
        self._tail = text[len(text) - self._overlap :] if len(text) > self._overlap else text

    def penalties(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]] | None:
        """Token ids and what to subtract from their logits; of an id that comes twice, the last one counts.

        None: nothing repeats.
        """
        self._prepare()
        first = self._start(self._count)
        size = self._count - first
        limit = min(self._since_breaker, size)
        allowed = self._allowed
        if size <= allowed or limit < allowed:
            return None
        places = (self._matches[first : self._count - 1] >= allowed).nonzero()[0]
        if not places.size:
            return None
        # a repeat lies in the window with all that it has, and goes no further back than to a breaker
        lengths = np.minimum(np.minimum(self._matches[first + places], places + 1), limit)
        order = lengths.argsort(kind="stable")
        ids = self._ids[first + 1 + places[order]]
        exponents = np.minimum(lengths[order] - allowed, self._longest)
        penalties = (self._multiplier * self._base**exponents).astype(np.float32)
        penalties[lengths[order] < allowed] = 0.0
        spared = [token_id for token_id in set(ids.tolist()) if self._breaks(token_id)]
        if spared:
            penalties[np.isin(ids, spared)] = 0.0
        return ids, penalties

    def _start(self, count: int) -> int:
        """Where the window begins, in `count` tokens."""
        return 0 if self._window is None else max(count - self._window, 0)

    def _breaks(self, token_id: int) -> bool:
        """Whether the token holds a whole breaker: it ends a repeat, and is not made less likely."""
        found = self._holds_breaker.get(token_id)
        if found is None:
            piece = self._piece_of(token_id)
            found = self._holds_breaker[token_id] = any(breaker in piece for breaker in self._breakers)
        return found

    def _prepare(self) -> None:
        """Reads the history, on first use: in the owner thread, and not on the event loop, which makes samplers."""
        if self._history is None:
            return
        history, self._history = self._history, None
        self._reserve(max(len(history) + 64, _FIRST_ROOM))
        self._count = len(history)
        self._ids[: self._count] = history
        self._matches[: max(self._count - 1, 0)] = suffix_matches(history)
        pieces = [self._piece_of(token_id) for token_id in history]
        text = b"".join(pieces)
        self._tail = text[max(len(text) - self._overlap, 0) :]
        end = max((text.rfind(breaker) + len(breaker) for breaker in self._breakers if breaker in text), default=0)
        ends = np.cumsum([len(piece) for piece in pieces]) if end else None
        self._since_breaker = self._count - (0 if ends is None else int(ends.searchsorted(end)) + 1)

    def _reserve(self, room: int) -> None:
        ids, matches = np.zeros(room, dtype=np.int32), np.zeros(room, dtype=np.int32)
        ids[: self._count] = self._ids[: self._count]
        matches[: self._count] = self._matches[: self._count]
        self._ids, self._matches = ids, matches


def suffix_matches(tokens: Sequence[int]) -> list[int]:
    """For every place but the last: how many tokens up to it are the same as at the end of all. (The Z algorithm.)"""
    count = len(tokens)
    backward = tokens[::-1]
    found = [0] * count
    left = right = 0  # backward[left:right] is the start of `backward` again, the one that reaches furthest
    for place in range(1, count):
        length = min(right - place, found[place - left]) if place < right else 0
        while place + length < count and backward[length] == backward[place + length]:
            length += 1
        found[place] = length
        if place + length > right:
            left, right = place, place + length
    return found[:0:-1]
