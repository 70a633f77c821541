"""What placing has to know of a request that goes from one attempt to the next."""

from __future__ import annotations

from typing import Protocol

from chorus.core.placement import FallingBack, Needs


class Carried(Protocol):
    """A request of which part may have been delivered when an attempt fails; its needs change with its model."""

    needs: Needs
    falling_back: FallingBack

    @property
    def begun(self) -> bool:
        """Whether the caller has got part of the answer."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens the caller has got."""
        ...

    @property
    def obstacle(self) -> str:
        """Why nobody else can go on with it; empty where somebody can."""
        ...

    def broken(self, reason: str) -> Needs:
        """What going on needs, now that an attempt has ended for that reason."""
        ...

    def time_left(self) -> float | None:
        """Seconds; None without a deadline. Raises DeadlineExceededError after it."""
        ...
