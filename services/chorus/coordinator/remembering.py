"""What a coordinator learnt of its models, kept over restarts: read once, written now and then and at the end."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path

from chorus.core.placement import KnownModels, Patterns
from chorus.store.memories import Memories, MemoryFile
from chorus.telemetry.logs import get_logger

# What a process that is killed may forget.
_INTERVAL_S = 60.0

_log = get_logger()


class Remembering:
    """Without a `path` nothing is kept. `wall` is seconds since the Unix epoch."""

    def __init__(self, path: Path | None, *, patterns: Patterns, known: KnownModels, wall: Callable[[], float]) -> None:
        self._path = path
        self._file = MemoryFile(path) if path is not None else None
        self._patterns = patterns
        self._known = known
        self._wall = wall
        self._written = Memories()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Recalls what was kept, before the first request, and begins to keep what comes."""
        if self._file is None:
            return
        try:
            self._written = await asyncio.to_thread(self._file.read)
        except (OSError, sqlite3.Error) as error:
            self._complain("memory.unread", error)
        self._patterns.recall(self._written.patterns)
        self._known.recall(self._written.known)
        self._task = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Keeps what there is."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._write()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await self._write()

    async def _write(self) -> None:
        now = self._wall()
        memories = Memories(self._patterns.remembered(now), self._known.remembered(now))
        if self._file is None or memories == self._written:
            return
        try:
            await asyncio.to_thread(self._file.write, memories)
        except (OSError, sqlite3.Error) as error:
            self._complain("memory.unwritten", error)
        else:
            self._written = memories

    def _complain(self, event: str, error: Exception) -> None:
        """A memory that can't be kept costs foresight, and nothing else."""
        _log.warning(event, file=str(self._path), why=str(error))
