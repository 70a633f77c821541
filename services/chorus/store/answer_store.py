"""The answers' file on a thread of its own, for an event loop that must not wait for a disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from chorus.core.cache.nearest import Vector
from chorus.core.errors import UnavailableError
from chorus.store.answers import AnswerFile, Kept, NewAnswer
from chorus.store.file_thread import FileThread
from chorus.store.recent import Recent

# Written together once there are so many, in a millisecond or two.
_USES_AT_ONCE = 256


STORE_ERRORS = (OSError, sqlite3.Error, ValueError, UnavailableError)
"""What a store may raise: an answer that can't be kept or found is no reason to give none."""


class Answers(Protocol):
    """What keeps answers, as a coordinator sees it: this one's file, or what several share (`shared_answers.py`).

    What each method does is said at AnswerFile's; `touch` notes that one was given, some time soon. Times are seconds
    since the epoch. Every method but `touch` may raise STORE_ERRORS.
    """

    async def find(self, key: str, sha256s: Sequence[str] | None, *, since: float, now: float) -> Kept | None: ...

    async def near(
        self, bucket: str, sha256s: Sequence[str], vector: Vector, *, since: float, limit: int
    ) -> list[Kept]: ...

    def touch(self, row: int, now: float) -> None: ...

    async def judged(self, row: int, *, right: bool) -> None: ...

    async def put(self, new: NewAnswer, now: float) -> None: ...

    async def clear(self, caller: str | None) -> int: ...

    async def count(self, caller: str | None) -> tuple[int, int]: ...

    async def close(self) -> None: ...


class AnswerStore:
    """One coordinator's own: a file, or memory. It is opened at its first use."""

    def __init__(self, path: Path | None, *, max_entries: int, max_bytes: int) -> None:
        self._path, self._max_entries, self._max_bytes = path, max_entries, max_bytes
        self._recent = Recent()
        self._used: dict[int, float] = {}
        self._thread = FileThread(self._opened, name="answers")

    async def find(self, key: str, sha256s: Sequence[str] | None, *, since: float, now: float) -> Kept | None:
        """As AnswerFile's, which is not asked for what was found a moment ago."""
        kept = None if sha256s is None else self._recent.find(key, sha256s, since=since)
        if kept is None:
            begun = self._recent.searching()
            kept = await self._thread.run(lambda file: file.find(key, sha256s, since=since))
            if kept is not None and sha256s is not None:
                self._recent.found(key, sha256s, kept, begun)
        if kept is not None:
            self.touch(kept.id, now)
        return kept

    async def near(
        self, bucket: str, sha256s: Sequence[str], vector: Vector, *, since: float, limit: int
    ) -> list[Kept]:
        """As AnswerFile's."""
        return await self._thread.run(lambda file: file.near(bucket, sha256s, vector, since=since, limit=limit))

    def touch(self, row: int, now: float) -> None:
        """The answer was given: it is not the next one to make room. Written later, many at once."""
        self._used[row] = now
        if len(self._used) >= _USES_AT_ONCE:
            used = self._uses()
            self._thread.later(lambda file: file.used(used))

    async def judged(self, row: int, *, right: bool) -> None:
        """As AnswerFile's."""
        await self._thread.run(lambda file: file.judged(row, right=right))

    async def put(self, new: NewAnswer, now: float) -> None:
        """As AnswerFile's."""
        self._recent.changed(new.key)
        used = self._uses()  # they say what makes room
        if await self._thread.run(lambda file: _put(file, new, now, used)):
            self._recent.clear()
        self._recent.changed(new.key)

    async def clear(self, caller: str | None) -> int:
        """As AnswerFile's."""
        try:
            return await self._thread.run(lambda file: file.clear(caller))
        finally:
            self._recent.clear()

    async def count(self, caller: str | None) -> tuple[int, int]:
        """As AnswerFile's."""
        return await self._thread.run(lambda file: file.count(caller))

    async def close(self) -> None:
        """Lets what was begun end, and closes the file. May be called again."""
        used = self._uses()
        await self._thread.close(lambda file: file.used(used))

    def _uses(self) -> dict[int, float]:
        used, self._used = self._used, {}
        return used

    # --- on the thread ----------------------------------------------------------------------------------------------

    def _opened(self) -> AnswerFile:
        file = AnswerFile(self._path, max_entries=self._max_entries, max_bytes=self._max_bytes)
        self._thread.later(self._load)
        return file

    def _load(self, file: AnswerFile) -> None:
        """Loads a batch; those who ask meanwhile come between two of them."""
        if file.load_more():
            self._thread.later(self._load)


def _put(file: AnswerFile, new: NewAnswer, now: float, used: dict[int, float]) -> int:
    file.used(used)
    return file.put(new, now)
