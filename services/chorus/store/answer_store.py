"""The answers' file on a thread of its own, for an event loop that must not wait for a disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from chorus.core.cache.nearest import Vector
from chorus.store.answers import AnswerFile, Kept, NewAnswer

T = TypeVar("T")


class AnswerStore:
    """What keeps answers, as a coordinator sees it. The file is opened at its first use; times are as AnswerFile's.

    Every method may raise OSError or sqlite3.Error: an answer that can't be kept or found is no reason to give none.
    """

    def __init__(self, path: Path | None, *, max_entries: int, max_bytes: int) -> None:
        self._path, self._max_entries, self._max_bytes = path, max_entries, max_bytes
        self._file: AnswerFile | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")

    async def find(self, key: str, sha256s: Sequence[str] | None, *, since: float, now: float) -> Kept | None:
        """As AnswerFile's."""
        return await self._run(lambda file: file.find(key, sha256s, since=since, now=now))

    async def near(
        self, bucket: str, sha256s: Sequence[str], vector: Vector, *, since: float, limit: int
    ) -> list[Kept]:
        """As AnswerFile's."""
        return await self._run(lambda file: file.near(bucket, sha256s, vector, since=since, limit=limit))

    async def touch(self, row: int, now: float) -> None:
        """As AnswerFile's."""
        await self._run(lambda file: file.touch(row, now))

    async def judged(self, row: int, *, right: bool) -> None:
        """As AnswerFile's."""
        await self._run(lambda file: file.judged(row, right=right))

    async def put(self, new: NewAnswer, now: float) -> None:
        """As AnswerFile's."""
        await self._run(lambda file: file.put(new, now))

    async def clear(self, caller: str | None) -> int:
        """As AnswerFile's."""
        return await self._run(lambda file: file.clear(caller))

    async def count(self, caller: str | None) -> tuple[int, int]:
        """As AnswerFile's."""
        return await self._run(lambda file: file.count(caller))

    async def close(self) -> None:
        """Lets what was begun end, and closes the file. May be called again."""
        if self._file is not None:
            await self._run(lambda file: file.close())
            self._file = None
        self._thread.shutdown(wait=False)

    async def _run(self, what: Callable[[AnswerFile], T]) -> T:
        def run() -> T:
            if self._file is None:
                self._file = AnswerFile(self._path, max_entries=self._max_entries, max_bytes=self._max_bytes)
            return what(self._file)

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)
