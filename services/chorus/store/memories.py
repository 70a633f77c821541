"""What a coordinator remembers over a restart, in SQLite: one row, written as a whole now and then."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from chorus.core.placement import KnownModel
from chorus.core.placement.patterns import ModelPattern
from chorus.store.sqlite import open_file

_SCHEMA = 1
_CREATE = "CREATE TABLE memories (id INTEGER PRIMARY KEY CHECK (id = 1), content BLOB NOT NULL);"


@dataclass(frozen=True, slots=True)
class Memories:
    """When models are asked for, and what they were like."""

    patterns: tuple[ModelPattern, ...] = ()
    known: tuple[KnownModel, ...] = ()


_MEMORIES = TypeAdapter(Memories)


class MemoryFile:
    """The file of one coordinator. Synchronous; it is open only while it is read or written.

    Both methods raise OSError and sqlite3.Error where the file can't be had.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Memories:
        """What was written last; nothing where that was never, or is not to be understood any more."""
        with closing(self._open()) as db:
            row = db.execute("SELECT content FROM memories").fetchone()
        try:
            return Memories() if row is None else _MEMORIES.validate_json(row[0])
        except ValidationError:
            return Memories()

    def write(self, memories: Memories) -> None:
        """Keeps these in place of all before."""
        with closing(self._open()) as db, db:
            db.execute("INSERT OR REPLACE INTO memories VALUES (1, ?)", (_MEMORIES.dump_json(memories),))

    def _open(self) -> sqlite3.Connection:
        return open_file(self._path, schema=_SCHEMA, create=_CREATE, table="memories")
