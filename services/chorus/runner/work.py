"""What a runner is busy with, so that a shutdown can wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from chorus.core.errors import DrainingError


class Work:
    """Counts requests. Once draining it takes no new ones. Used from one event loop."""

    def __init__(self) -> None:
        self._count = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def count(self) -> int:
        """How many requests are being worked on."""
        return self._count

    def admit(self) -> None:
        """Returns if new work is taken. Raises DrainingError."""
        if self._draining:
            raise DrainingError("this runner is shutting down and takes nothing new; another one will")

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Counts one request for the length of a `with` block. Raises as `admit`."""
        self.admit()
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if self._count == 0:
                self._idle.set()

    def drain(self) -> None:
        """Takes nothing new from now on."""
        self._draining = True

    async def finished(self, timeout_s: float) -> bool:
        """Waits at most that long for what is being worked on; returns whether it has finished."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
