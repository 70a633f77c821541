"""Which of several equal peers is asked next: spread by what goes on at each, and away from those that fail.

A caller with little to do stays with one of them, which then knows its conversations; one with much to do spreads it,
since whoever has the fewest of its calls comes first. Different callers begin at different peers.

Times are seconds on any clock that only goes forward.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(slots=True)
class _Peer:
    calls: int = 0
    failed_at: float | None = None


class Peers:
    """`count` peers (at least one), known by their places from 0; `first` is the one that an idle caller begins with.

    A peer that failed is passed over until `answered`, unless there is no other: then whoever failed longest ago is
    asked first.
    """

    def __init__(self, count: int, first: int = 0) -> None:
        self._peers = [_Peer() for _ in range(count)]
        self._last = first % count

    def choose(self, without: Container[int] = ()) -> int | None:
        """The peer to ask next, none of `without`; None where nobody is left."""
        left = [place for place in range(len(self._peers)) if place not in without]
        return min(left, key=self._order, default=None)

    def others(self, place: int) -> bool:
        """Whether somebody else than this one could be asked who has not failed."""
        return any(other != place and peer.failed_at is None for other, peer in enumerate(self._peers))

    def began(self, place: int) -> None:
        """A call to it begins."""
        self._peers[place].calls += 1

    def ended(self, place: int) -> None:
        """A call to it has ended, however it did."""
        self._peers[place].calls -= 1

    def answered(self, place: int) -> None:
        """It does what it is asked."""
        self._peers[place].failed_at = None
        self._last = place

    def recovered(self, place: int) -> None:
        """It was asked whether it serves again, and does."""
        self._peers[place].failed_at = None

    def failed(self, place: int, now: float) -> None:
        """It broke off, cannot be reached, is silent, or is about to stop."""
        self._peers[place].failed_at = now

    def _order(self, place: int) -> tuple[float, int, int]:
        peer = self._peers[place]
        # Times may be negative; whoever has not failed comes before all of them.
        failed_at = float("-inf") if peer.failed_at is None else peer.failed_at
        return failed_at, peer.calls, (place - self._last) % len(self._peers)
