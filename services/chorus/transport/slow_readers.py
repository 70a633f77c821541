"""Callers that do not read their streams: what a server holds for them is bounded in bytes, and here in time.

A message is written once the caller's window has room for it. Until then the call waits, and with it all that it has: a
place at the coordinator, a slot of an engine that is behind HTTP, a watcher's news. So a write that waits too long
ends its call. Who reads again finds what was sent before, then the error.
"""

from __future__ import annotations

import asyncio
from typing import Any

from chorus.core.errors import SlowReaderError
from chorus.transport.options import SLOW_READER_S


class SlowReaders:
    """The writes of one listener that wait for their readers, `limit_s` at most. Used from one event loop."""

    def __init__(self, limit_s: float = SLOW_READER_S) -> None:
        self._limit_s = limit_s
        self._since: dict[asyncio.Task[object], float] = {}
        self._cut_off: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watched(self, context: Any) -> Any:
        """The context of the current task's call, whose writes are looked after."""
        task = asyncio.current_task()
        assert task is not None
        return _Watched(context, self, task)

    def why_ended(self) -> SlowReaderError | None:
        """Why the call of the current task, which is being cancelled, was cut off; None where it was not.

        It is not being cancelled any more then.
        """
        task = asyncio.current_task()
        if task is None or task not in self._cut_off:
            return None
        self._cut_off.discard(task)
        task.uncancel()
        return SlowReaderError(
            f"the caller has read nothing of this stream for {self._limit_s:g} s while messages wait "
            "(mesh.slow_reader_s); read it, or ask for less"
        )

    def ended(self) -> None:
        """The call of the current task has ended."""
        task = asyncio.current_task()
        if task is not None:
            self._cut_off.discard(task)

    def close(self) -> None:
        """Looks no more."""
        if self._timer is not None:
            self._timer.cancel()

    def begins(self, task: asyncio.Task[object]) -> None:
        """The task's call waits for its reader from now on."""
        loop = asyncio.get_running_loop()
        self._since[task] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._limit_s / 4, self._look)

    def has_read(self, task: asyncio.Task[object]) -> None:
        """It waits no more."""
        self._since.pop(task, None)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        before = loop.time() - self._limit_s
        for task in [task for task, since in self._since.items() if since < before]:
            del self._since[task]
            self._cut_off.add(task)
            task.cancel()
        if self._since:
            self._timer = loop.call_later(self._limit_s / 4, self._look)


class _Watched:
    """A call's context; all but writing is the context's own."""

    __slots__ = ("_context", "_readers", "_task")

    def __init__(self, context: Any, readers: SlowReaders, task: asyncio.Task[object]) -> None:
        self._context = context
        self._readers = readers
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        """Writes a message once the caller has room for it."""
        self._readers.begins(self._task)
        try:
            await self._context.write(message)
        finally:
            self._readers.has_read(self._task)
