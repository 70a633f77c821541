"""Only so many models compute at one time: their owner threads take turns, a step each."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator


class Turns:
    """At most `places` threads at a time are inside `taken`; the others come in the order in which they asked.

    A thread that wants a turn again, as each does after every step, stands behind those who wait already: so models
    take steps in turn, however unlike these are. With 0 places nobody ever waits.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._inside = 0
        self._waiting: deque[threading.Event] = deque()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Waits for a turn, and gives it on at the end."""
        if not self._places:
            yield
            return
        self._take()
        try:
            yield
        finally:
            self._give()

    def _take(self) -> None:
        with self._lock:
            if self._inside < self._places:
                self._inside += 1
                return
            called = threading.Event()
            self._waiting.append(called)
        called.wait()

    def _give(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # the place goes over, so nobody slips in between
            else:
                self._inside -= 1
