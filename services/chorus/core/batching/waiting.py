"""Requests that wait for a slot: urgent ones first, in order of arrival, and only so many."""

from __future__ import annotations

import itertools
from bisect import insort
from typing import Generic, TypeVar

from chorus.core.errors import OverloadedError
from chorus.core.generation import Priority

_RANK = {Priority.INTERACTIVE: 0, Priority.BATCH: 1, Priority.BACKGROUND: 2}
_UNKNOWN_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0
_SHORTEST_WAIT_S = 0.05

T = TypeVar("T")


def rank(priority: Priority) -> int:
    """How far back a priority stands: 0 for the most urgent."""
    return _RANK[priority]


class ServiceRate:
    """How many requests leave their slot in a second, measured over the last dozen or so."""

    _WEIGHT = 0.15

    def __init__(self) -> None:
        self._interval_s: float | None = None
        self._last_at: float | None = None

    def finished(self, now: float) -> None:
        """A request gave its slot back at `now` (seconds of any steady clock)."""
        if self._last_at is not None:
            interval = max(now - self._last_at, 0.0)
            old = self._interval_s
            self._interval_s = interval if old is None else old + self._WEIGHT * (interval - old)
        self._last_at = now

    def idle(self) -> None:
        """Nobody waits or runs any more: the time until the next request says nothing about the rate."""
        self._last_at = None

    def wait_s(self, places: int) -> float | None:
        """How long it takes until so many requests have left, in seconds; None where nothing was measured yet."""
        if self._interval_s is None:
            return None
        return min(max(self._interval_s * places, _SHORTEST_WAIT_S), _LONGEST_WAIT_S)


class WaitingRoom(Generic[T]):
    """The queue in front of the slots.

    Within one priority it is first come, first served; a less urgent request waits as long as urgent ones keep coming.
    """

    def __init__(self, capacity: int) -> None:
        """At most `capacity` requests wait."""
        self.capacity = capacity
        self.rate = ServiceRate()
        self._arrivals = itertools.count()
        self._entries: list[tuple[int, int, T]] = []

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, item: T, priority: Priority, arrival: int | None = None) -> int:
        """Lets `item` wait; returns how many are before it. Raises `OverloadedError` when the room is full.

        Whoever numbers arrivals itself gives the number, and is refused by nobody: it may be there again.
        """
        if arrival is None:
            if len(self._entries) >= self.capacity:
                raise self.refusal(len(self._entries))
            arrival = next(self._arrivals)
        entry = (_RANK[priority], arrival, item)
        insort(self._entries, entry, key=_order)
        return self._entries.index(entry)

    def refusal(self, waiting: int) -> OverloadedError:
        """The error for a request that finds `waiting` others waiting and no place left."""
        return OverloadedError(
            f"{waiting} requests wait already, which is as many as this engine lets wait",
            metadata={"queued": str(waiting)},
            retry_after_s=self.rate.wait_s(1) or _UNKNOWN_WAIT_S,
        )

    def first(self) -> T | None:
        """Whoever is next, still waiting."""
        return self._entries[0][2] if self._entries else None

    def pop(self) -> T | None:
        """Takes whoever is next out of the room."""
        return self._entries.pop(0)[2] if self._entries else None

    def remove(self, item: T) -> bool:
        """Takes `item` out, wherever it stands; returns whether it was there."""
        for place, (_, _, waiting) in enumerate(self._entries):
            if waiting is item:
                del self._entries[place]
                return True
        return False

    def items(self) -> list[T]:
        """Everybody who waits, the next one first."""
        return [item for _, _, item in self._entries]


def _order(entry: tuple[int, int, object]) -> tuple[int, int]:
    return entry[:2]
