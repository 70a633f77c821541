"""The places that one model has at a server: who is there, who waits, and how they are all sent away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from chorus.core.batching.waiting import WaitingRoom
from chorus.core.errors import ChorusError
from chorus.core.generation import Priority

T = TypeVar("T")


class Run:
    """One request from its arrival to its end. Everything happens on the event loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.error: ChorusError | None = None
        self.has_slot = False
        self.admission: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self._scope: asyncio.Timeout | None = None

    def abort(self, error: ChorusError) -> None:
        """Ends whatever it waits for, or will, with `error`."""
        if self.error is not None:
            return
        self.error = error
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def wait(self, awaitable: Awaitable[T], limit_s: float | None = None) -> T:
        """Awaits something, unless `abort` comes first: then its error is raised, in this very task.

        Raises `TimeoutError` after `limit_s`.
        """
        try:
            async with asyncio.timeout(0 if self.error is not None else limit_s) as self._scope:
                result = await awaitable
        except (TimeoutError, ChorusError):
            if self.error is None:
                raise
        finally:
            self._scope = None
        if self.error is not None:
            raise self.error.with_traceback(None)
        return result


class Slots:
    """The places of one model and the queue in front of them."""

    def __init__(self, total: int, max_queue: int) -> None:
        self.total = total
        self.used = 0
        self.room: WaitingRoom[Run] = WaitingRoom(max_queue)
        self.runs: set[Run] = set()

    @contextmanager
    def entered(self) -> Iterator[Run]:
        """A run among those of the model; leaving gives its slot to whoever is next."""
        run = Run()
        self.runs.add(run)
        try:
            yield run
        finally:
            self._leave(run)

    def admit(self, run: Run, priority: Priority) -> int | None:
        """Takes a slot, or a place in the queue, and returns how many are before it there (None: it has its slot).

        Raises `OverloadedError` when the queue is full. Who waits has its slot once `run.admission` is done.
        """
        if self.used < self.total and not self.room:
            self._take(run)
            return None
        return self.room.add(run, priority)

    def abort_all(self, error: ChorusError) -> None:
        """Ends every run with `error`."""
        for run in self.runs:
            run.abort(error)

    def _take(self, run: Run) -> None:
        self.used += 1
        run.has_slot = True
        if not run.admission.done():
            run.admission.set_result(None)

    def _leave(self, run: Run) -> None:
        self.runs.discard(run)
        self.room.remove(run)
        run.admission.cancel()
        if run.has_slot:
            self.used -= 1
            self.room.rate.finished(asyncio.get_running_loop().time())
        while self.used < self.total and (following := self.room.pop()) is not None:
            self._take(following)
        if not self.used:
            self.room.rate.idle()
        if not run.done.done():
            run.done.set_result(None)
