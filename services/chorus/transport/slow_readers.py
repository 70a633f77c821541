"""Callers that do not read their streams: what a server holds for them is bounded in bytes, and here in time.

A message is written once the caller's window has room for it. Until then the call waits, and with it all that it has: a
place at the coordinator, a slot of an engine that is behind HTTP, a watcher's news. So a write that waits too long
ends its call. Who reads again finds what was sent before, then the error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from chorus.core.errors import SlowReaderError
from chorus.transport.options import SLOW_READER_S

# How often a look is taken within the limit.
_LOOKS = 8


class SlowReaders:
    """The writes of one listener that wait for their readers, `limit_s` at most. Used from one event loop.

    A write costs a message nothing but a mark: who waits is found by looking now and then.
    """

    def __init__(self, limit_s: float = SLOW_READER_S) -> None:
        self._limit_s = limit_s
        self._calls: dict[asyncio.Task[object], _Watched] = {}
        self._cut_off: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watched(self, context: Any) -> Any:
        """The context of the current task's call, whose writes are looked after until it has `ended`."""
        task = asyncio.current_task()
        assert task is not None
        self._calls[task] = call = _Watched(context)
        if self._timer is None:
            self._look_later()
        return call

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
            self._calls.pop(task, None)
            self._cut_off.discard(task)

    def close(self) -> None:
        """Looks no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._limit_s / _LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for task, call in self._calls.items():
            if call.waits_s(now) >= self._limit_s and task not in self._cut_off:
                self._cut_off.add(task)
                task.cancel()
        if self._calls:
            self._look_later()


class _Watched:
    """A call's context; all but writing is the context's own."""

    __slots__ = ("_context", "_last", "_seen", "_since", "_write")

    def __init__(self, context: Any) -> None:
        self._context = context
        self._write = context.write
        self._last: Any = None  # write
        self._seen: Any = None  # the write that waited at the last look
        self._since = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def write(self, message: Any) -> Awaitable[None]:
        """Writes a message once the caller has room for it."""
        # No coroutine of its own: each that a call waits in is passed through with every message of its stream.
        self._last = written = self._write(message)
        return written  # type: ignore[no-any-return]

    def waits_s(self, now: float) -> float:
        """For how long looks have found the same write waiting; 0 where none does."""
        last = self._last
        if last is None or last.cr_await is None:  # as of a coroutine that has ended
            self._seen = None
            return 0.0
        if last is not self._seen:
            self._seen, self._since = last, now
        return now - self._since
