"""What batches are made of: sequences, the chunks of them that are computed, and what is done to memory before."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TypeAlias

from chorus.core.generation import Priority

LEAST_SHARED = 16
"""Fewer tokens than this are computed again: a shared start is worth a copy, a shared word is not."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice on its way through the batches.

    `tokens` is its owner's list of prompt and answer, which grows as tokens are drawn; `computed` of them are in KV
    memory, `most` is how many there can ever be. Sequences of different lanes are never in one batch and share nothing.
    With `scores`, logits are wanted at the first `scores` positions and not only at the last. `draft` are tokens that
    may come next, to be checked by the next batch. `reused` is how many tokens it found in memory at its admission.
    """

    tokens: list[int]
    most: int
    group: object
    priority: Priority = Priority.INTERACTIVE
    lane: Hashable = None
    scores: int = 0
    computed: int = 0
    slot: int | None = None
    draft: list[int] = field(default_factory=list)
    reused: int | None = None
    claim: int = 0
    spared: int = 0
    arrival: int = -1
    leader: Sequence | None = None
    awaits: int = 0

    @property
    def known(self) -> int:
        """How many tokens it has."""
        return len(self.tokens)

    @property
    def missing(self) -> int:
        """How many of them are not in memory; the last one never is before its successor is to be drawn."""
        return len(self.tokens) - self.computed

    @property
    def promised(self) -> int:
        """The cells that are kept for it: what it claimed, or what it has grown to since."""
        return max(self.claim, min(self.most, len(self.tokens) + LEAST_SHARED) - self.spared)


@dataclass(frozen=True, slots=True)
class Copy:
    """Let slot `target`, which is empty, share the first `count` tokens of slot `source`."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class Trim:
    """Let slot `slot` keep its first `length` tokens alone; 0 forgets it."""

    slot: int
    length: int


Operation: TypeAlias = Copy | Trim


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start + count` of a sequence, with its draft behind them. The last `outputs` have logits."""

    sequence: Sequence
    start: int
    count: int
    outputs: int
    draft: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """One batch of one lane. What `Scheduler.operations` returns comes before it."""

    chunks: tuple[Chunk, ...]
    lane: Hashable = None
