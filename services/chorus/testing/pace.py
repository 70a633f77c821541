"""When a fake engine's tokens come: at once, at a rate, or when a test says so."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol


class PacedStream(Protocol):
    """The pace of one stream."""

    def due(self) -> asyncio.Future[None] | None:
        """Called before each token: None if it may come now, else a future to await first."""
        ...


class Pace(Protocol):
    """Makes the pace of each new stream."""

    def begin(self) -> PacedStream:
        """Called once a stream, on the event loop."""
        ...


class RatePace:
    """So many tokens a second in each stream, without drift; 0 is as fast as possible."""

    def __init__(self, tokens_per_second: float = 0.0) -> None:
        self._interval_s = 1.0 / tokens_per_second if tokens_per_second > 0 else 0.0

    def begin(self) -> PacedStream:
        """A stream whose first token comes after one interval."""
        return _Rated(self._interval_s) if self._interval_s else _Unhurried()


class _Unhurried:
    """As fast as possible, but letting the event loop run every few tokens."""

    __slots__ = ("_count",)

    def __init__(self) -> None:
        self._count = 0

    def due(self) -> asyncio.Future[None] | None:
        self._count += 1
        if self._count % 8:
            return None
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        loop.call_soon(_open, future)
        return future


class _Rated:
    """One token an interval."""

    __slots__ = ("_interval_s", "_next_at")

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next_at = asyncio.get_running_loop().time()

    def due(self) -> asyncio.Future[None] | None:
        loop = asyncio.get_running_loop()
        self._next_at = max(self._next_at + self._interval_s, loop.time())
        future = loop.create_future()
        loop.call_at(self._next_at, _open, future)
        return future


class ManualPace:
    """Tokens come when the test releases them, to the streams in the order in which they asked."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._permits = 0
        self._open = False
        self._watchers: list[tuple[int, asyncio.Future[None]]] = []

    def begin(self) -> PacedStream:
        """All streams share the permits."""
        return self

    def due(self) -> asyncio.Future[None] | None:
        """Takes a permit, or waits for one."""
        if self._open:
            return None
        if self._permits:
            self._permits -= 1
            return None
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        waiting = self._count_waiting()
        for count, watcher in self._watchers:
            if waiting >= count and not watcher.done():
                watcher.set_result(None)
        return future

    def release(self, count: int = 1) -> None:
        """Lets `count` more tokens come, over all streams."""
        for _ in range(count):
            while self._waiting and self._waiting[0].done():
                self._waiting.popleft()
            if self._waiting:
                self._waiting.popleft().set_result(None)
            else:
                self._permits += 1

    def release_all(self) -> None:
        """From now on tokens come as fast as they can."""
        self._open = True
        self.release(len(self._waiting))

    async def waiting(self, count: int) -> None:
        """Returns once at least `count` streams wait for a permit."""
        if self._count_waiting() >= count:
            return
        watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers.append((count, watcher))
        try:
            await watcher
        finally:
            self._watchers.remove((count, watcher))

    def _count_waiting(self) -> int:
        return sum(not future.done() for future in self._waiting)


def _open(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
