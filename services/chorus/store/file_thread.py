"""A file on a thread of its own, for an event loop that must not wait for a disk."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Closable(Protocol):
    """What such a file can do at least."""

    def close(self) -> None:
        """Closes it."""
        ...


FileT = TypeVar("FileT", bound=Closable)


class FileThread(Generic[FileT]):
    """What is asked of a file is done in this order, one after the other. `opens` opens it, at its first use."""

    def __init__(self, opens: Callable[[], FileT], *, name: str) -> None:
        self._opens = opens
        self._file: FileT | None = None
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, what: Callable[[FileT], T]) -> T:
        """Does something and returns what it returned. Raises what that raises, and what opening raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: what(self._opened()))

    def later(self, what: Callable[[FileT], object]) -> None:
        """Has something done that nobody waits for, if the file is still open then.

        A disk that fails is told to the next who waits.
        """

        def run() -> None:
            if self._file is not None and not self._closed:
                with suppress(OSError, sqlite3.Error):
                    what(self._file)

        with suppress(RuntimeError):  # closed
            self._thread.submit(run)

    async def close(self, last: Callable[[FileT], object]) -> None:
        """Lets what was begun end, does `last`, and closes the file, if it was opened. May be called again."""
        if self._closed:
            return
        self._closed = True
        # On the thread, so that a file whose opening is under way is closed, too.
        await asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._end(last))
        self._thread.shutdown(wait=False)

    def _end(self, last: Callable[[FileT], object]) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                last(file)
            finally:
                file.close()

    def _opened(self) -> FileT:
        if self._file is None:
            self._file = self._opens()
        return self._file
