"""Identical requests under way at the same time: one is run, and everybody reads its stream.

The run belongs to nobody: it goes on as long as somebody reads, so that the first caller may go away, and ends, freeing
its slot, once nobody does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from chorus.coordinator.requests import Sink
from chorus.transport.guarding import is_being_cancelled

# Given where the stream goes, and how long whoever began it waits to be admitted, in seconds.
Run = Callable[[Sink, float | None], Coroutine[Any, Any, None]]


class Flight:
    """One run. `time_left_s` is how long the caller who began it waits, None for ever.

    The run is given twice that once it is admitted: those who come while it goes on wait longer, and it ends with its
    last reader anyway. To be admitted it has no longer than that caller, or it would be queued for nobody.
    """

    def __init__(self, run: Run, *, time_left_s: float | None, clock: Callable[[], float]) -> None:
        self._ends = None if time_left_s is None else clock() + 2.0 * time_left_s
        self._admitted_within_s = time_left_s
        self._clock = clock
        self._readers = 0
        self._news = asyncio.Event()
        self._whole = False
        self._error: BaseException | None = None
        self.messages: list[bytes] = []
        self.task = asyncio.create_task(self._fly(run))

    @property
    def whole(self) -> bool:
        """Whether the stream has ended well."""
        return self._whole

    def serves(self, time_left_s: float | None) -> bool:
        """Whether somebody who waits that long may read it: it is whole, or it goes on and ends no sooner than they."""
        if self._whole or self._error is not None:
            return self._whole
        return self._ends is None or (time_left_s is not None and self._clock() + time_left_s <= self._ends)

    async def read(self, write: Callable[[bytes], Awaitable[None]], *, first: bytes | None = None) -> None:
        """Writes `first`, then the whole stream; raises what the run ended with."""
        self._readers += 1
        try:
            if first is not None:
                await write(first)
            sent = 0
            while True:
                while sent < len(self.messages):
                    await write(self.messages[sent])
                    sent += 1
                if self._error is not None:
                    raise self._error
                if self._whole:
                    return
                news = self._news
                await news.wait()
        finally:
            self._readers -= 1
            if not self._readers and not self._whole:
                self._error = self._error or asyncio.CancelledError()
                self.task.cancel()

    # --- what the run writes to -------------------------------------------------------------------------------------

    async def write(self, message: bytes) -> None:
        """Takes a message of the run."""
        self.messages.append(message)
        self._tell()

    def time_remaining(self) -> float | None:
        """Until the run ends; nobody reads along who waits longer."""
        return None if self._ends is None else max(0.0, self._ends - self._clock())

    async def _fly(self, run: Run) -> None:
        try:
            await run(self, self._admitted_within_s)
            self._whole = True
        except asyncio.CancelledError:
            self._error = self._error or asyncio.CancelledError()
            if is_being_cancelled():
                raise
        except Exception as error:
            self._error = error
        finally:
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
