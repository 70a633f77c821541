"""Only so many models compute at one time: their owner threads take turns, a step each."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator


class Turns:
    """At most `places` owners at a time are inside `taken`; the others come in the order in which they asked.

    An owner is a thread's own object. One that wants a turn again, as each does after every step, stands behind those
    who wait already: so models take steps in turn, however unlike these are. With 0 places nobody ever waits.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._inside: set[object] = set()
        self._waiting: deque[tuple[object, threading.Event]] = deque()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def taken(self, owner: object) -> Iterator[None]:
        """Waits for a turn, and gives it on at the end."""
        if not self._places:
            yield
            return
        self._take(owner)
        try:
            yield
        finally:
            self.give_on(owner)

    def give_on(self, owner: object) -> None:
        """Ends the turn of `owner`, if it has one. From any thread: of one that hangs in it, nobody else gets it on."""
        with self._lock:
            if owner not in self._inside:
                return
            self._inside.remove(owner)
            if self._waiting:
                following, called = self._waiting.popleft()
                self._inside.add(following)  # the place goes over, so nobody slips in between
                called.set()

    def _take(self, owner: object) -> None:
        with self._lock:
            if len(self._inside) < self._places:
                self._inside.add(owner)
                return
            called = threading.Event()
            self._waiting.append((owner, called))
        called.wait()
