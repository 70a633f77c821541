"""How many requests a coordinator takes on at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from chorus.core.errors import OverloadedError

_RETRY_MIN_S = 0.1
_RETRY_MAX_S = 30.0
_SMOOTHING = 0.1


class Admission:
    """A bound on requests under way. Who is refused is told when a place is likely, going by recent ones."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running = 0
        self._typical_s = 1.0

    @property
    def running(self) -> int:
        """Requests under way."""
        return self._running

    @contextmanager
    def admitted(self, clock: Callable[[], float]) -> Iterator[None]:
        """Holds a place; raises OverloadedError where there is none. `clock` is in seconds."""
        if self._running >= self._limit:
            wait_s = min(max(self._typical_s / self._limit, _RETRY_MIN_S), _RETRY_MAX_S)
            raise OverloadedError(
                f"this coordinator has {self._limit} requests under way, as many as coordinator.max_requests allows",
                retry_after_s=wait_s,
            )
        self._running += 1
        began = clock()
        try:
            yield
        finally:
            self._running -= 1
            self._typical_s += _SMOOTHING * (clock() - began - self._typical_s)
