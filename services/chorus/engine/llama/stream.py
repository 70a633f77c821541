"""The event loop's end of one generation."""

from __future__ import annotations

import asyncio
from collections import deque

from chorus.core.errors import ChorusError
from chorus.core.generation import Event, Finished


class EventStream:
    """Events as they come, read by one task. Everything happens on the event loop.

    What is not read yet is kept; a generation is bounded by its context, and so is this.
    """

    __slots__ = ("_items", "_waiter", "ended")

    def __init__(self) -> None:
        self._items: deque[Event | ChorusError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.ended = False

    def push(self, item: Event | ChorusError) -> None:
        """Takes the next event; `Finished` or an error is the last."""
        if self.ended:
            return
        self._items.append(item)
        self.ended = isinstance(item, Finished | ChorusError)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Event | None:
        """The next event, or None after `Finished`. Raises the error that came instead."""
        while not self._items:
            if self.ended:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, ChorusError):
            raise item
        return item
