"""Answers in SQLite, in a file or in memory, with the vectors of their questions beside them.

Synchronous, and used from one thread at a time (`AnswerStore` sees to it). Times are seconds since the epoch, given by
the caller. The vectors are in the same rows as the answers, so the two can't disagree; what finds the nearest of them
(`core/cache/nearest.py`) is made from the rows when the file is opened. A file is no contract: one of another version
of this schema, or one that is damaged, is made anew.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from chorus.core.cache.nearest import Nearest, Vector, signs

_SCHEMA = 1
_CREATE = """
CREATE TABLE answers (
  id INTEGER PRIMARY KEY,
  key TEXT NOT NULL,
  sha256 TEXT NOT NULL,
  caller TEXT NOT NULL,
  answer BLOB NOT NULL,
  tokens INTEGER NOT NULL,
  size INTEGER NOT NULL,
  made REAL NOT NULL,
  used REAL NOT NULL,
  question TEXT,
  bucket TEXT,
  vector BLOB,
  right INTEGER NOT NULL DEFAULT 0,
  wrong INTEGER NOT NULL DEFAULT 0,
  UNIQUE (key, sha256)
);
CREATE INDEX by_use ON answers (used);
CREATE INDEX by_caller ON answers (caller);
"""
_CANDIDATES = 64
# What an entry takes beside its answer, roughly: its row, its indexes, its vector.
_ROW_BYTES = 1024
# Evicting some more than needed spares doing it at each new answer.
_EVICTED_AT_ONCE = 0.02


@dataclass(frozen=True, slots=True)
class NewAnswer:
    """An answer to keep. `vector` is of length one, and there only with a question and a bucket."""

    key: str
    sha256: str
    caller: str
    answer: bytes
    tokens: int
    question: str | None = None
    bucket: str | None = None
    vector: Vector | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer that was kept; `cosine` is that to what was asked for, 1 for the same request."""

    id: int
    sha256: str
    answer: bytes
    tokens: int
    made: float
    question: str = ""
    right: int = 0
    wrong: int = 0
    cosine: float = 1.0


class AnswerFile:
    """The answers of one file; `path` None keeps them in memory. Raises OSError where the file can't be had."""

    def __init__(self, path: Path | None, *, max_entries: int, max_bytes: int) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._db = _opened(path)
        self._nearest: dict[int, Nearest] = {}
        self.entries, self.size = self._db.execute("SELECT count(*), coalesce(sum(size), 0) FROM answers").fetchone()
        for row, bucket, vector in self._db.execute("SELECT id, bucket, vector FROM answers WHERE bucket NOT NULL"):
            self._index(row, bucket, _vector(vector))

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def find(self, key: str, sha256s: Sequence[str] | None, *, since: float, now: float) -> Kept | None:
        """The newest answer to a request by one of these artifacts (None: whichever), made after `since`."""
        row = self._db.execute(
            "SELECT id, sha256, answer, tokens, made FROM answers WHERE key = ? AND made > ? "
            "AND (? IS NULL OR sha256 IN (SELECT value FROM json_each(?))) ORDER BY made DESC LIMIT 1",
            (key, since, *(2 * (None if sha256s is None else json.dumps(sha256s),))),
        ).fetchone()
        if row is None:
            return None
        self.touch(row[0], now)
        return Kept(*row)

    def near(self, bucket: str, sha256s: Sequence[str], vector: Vector, *, since: float, limit: int) -> list[Kept]:
        """The answers to the nearest questions of a bucket, the nearest first."""
        bits = signs(vector)
        nearest = self._nearest.get(len(bits))
        ids = nearest.near(_group(bucket), bits, _CANDIDATES) if nearest is not None else []
        if not ids:
            return []
        rows = self._db.execute(
            "SELECT id, sha256, answer, tokens, made, question, right, wrong, vector FROM answers "
            "WHERE id IN (SELECT value FROM json_each(?)) AND bucket = ? AND made > ? "
            "AND sha256 IN (SELECT value FROM json_each(?))",
            (json.dumps(ids), bucket, since, json.dumps(sha256s)),
        ).fetchall()
        found = [replace(Kept(*row[:-1]), cosine=float(_vector(row[-1]) @ vector)) for row in rows]
        return sorted(found, key=lambda kept: -kept.cosine)[:limit]

    def touch(self, row: int, now: float) -> None:
        """The answer was given: it is not the next one to make room."""
        with self._db:
            self._db.execute("UPDATE answers SET used = ? WHERE id = ?", (now, row))

    def judged(self, row: int, *, right: bool) -> None:
        """A hit of it was compared with a new answer."""
        with self._db:
            self._db.execute(
                "UPDATE answers SET right = right + ?, wrong = wrong + ? WHERE id = ?", (right, not right, row)
            )

    def put(self, new: NewAnswer, now: float) -> None:
        """Keeps an answer in place of an earlier one to the same request; those least used make room."""
        size = len(new.answer) + len(new.question or "") + _ROW_BYTES
        if size > self._max_bytes:
            return
        vector = None if new.vector is None or new.bucket is None else new.vector.astype(np.float16).tobytes()
        bucket = None if vector is None else new.bucket
        with self._db:
            self._drop(
                self._db.execute("SELECT id, size FROM answers WHERE key = ? AND sha256 = ?", (new.key, new.sha256))
            )
            cursor = self._db.execute(
                "INSERT INTO answers (key, sha256, caller, answer, tokens, size, made, used, question, bucket, vector) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    new.key,
                    new.sha256,
                    new.caller,
                    new.answer,
                    new.tokens,
                    size,
                    now,
                    now,
                    new.question,
                    bucket,
                    vector,
                ),
            )
            self.entries, self.size = self.entries + 1, self.size + size
            self._make_room()
        if new.vector is not None and new.bucket is not None and cursor.lastrowid is not None:
            self._index(cursor.lastrowid, new.bucket, new.vector)

    def clear(self, caller: str | None) -> int:
        """Forgets one caller's answers, or (None) everybody's; returns how many."""
        with self._db:
            return self._drop(
                self._db.execute("SELECT id, size FROM answers WHERE ? IS NULL OR caller = ?", (caller, caller))
            )

    def count(self, caller: str | None) -> tuple[int, int]:
        """How many answers there are of one caller, or of everybody, and their bytes."""
        if caller is None:
            return self.entries, self.size
        found: tuple[int, int] = self._db.execute(
            "SELECT count(*), coalesce(sum(size), 0) FROM answers WHERE caller = ?", (caller,)
        ).fetchone()
        return found

    def _make_room(self) -> None:
        if self.entries <= self._max_entries and self.size <= self._max_bytes:
            return
        entries, size = (bound - int(bound * _EVICTED_AT_ONCE) for bound in (self._max_entries, self._max_bytes))
        left, gone = self.size, list[tuple[int, int]]()
        # The newest is the last one and stays.
        for row in self._db.execute("SELECT id, size FROM answers ORDER BY used, id LIMIT ?", (self.entries - 1,)):
            if self.entries - len(gone) <= entries and left <= size:
                break
            gone.append(row)
            left -= row[1]
        self._drop(gone)

    def _drop(self, rows: Iterable[tuple[int, int]]) -> int:
        """Deletes rows, given by id and size; returns how many."""
        gone = list(rows)
        self._db.executemany("DELETE FROM answers WHERE id = ?", [(row,) for row, _ in gone])
        for row, size in gone:
            self.entries, self.size = self.entries - 1, self.size - size
            for nearest in self._nearest.values():
                nearest.remove(row)
        return len(gone)

    def _index(self, row: int, bucket: str, vector: Vector) -> None:
        bits = signs(vector)
        self._nearest.setdefault(len(bits), Nearest(len(bits))).add(row, _group(bucket), bits)


def _opened(path: Path | None) -> sqlite3.Connection:
    if path is None:
        return _made(sqlite3.connect(":memory:", check_same_thread=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)  # it holds what people asked
    try:
        db = sqlite3.connect(path, check_same_thread=False)
        if db.execute("PRAGMA user_version").fetchone()[0] == _SCHEMA:
            db.execute("SELECT count(*) FROM answers").fetchone()
            return _quick(db)
        db.close()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise OSError(f"{path}: {error}") from error
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).unlink()
    path.touch(mode=0o600)
    return _made(_quick(sqlite3.connect(path, check_same_thread=False)))


def _made(db: sqlite3.Connection) -> sqlite3.Connection:
    db.executescript(_CREATE + f"PRAGMA user_version = {_SCHEMA};")
    return db


def _quick(db: sqlite3.Connection) -> sqlite3.Connection:
    # What a crash of the machine may lose are the newest answers, which only cost time to have again.
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    return db


def _vector(blob: bytes) -> Vector:
    return np.frombuffer(blob, np.float16).astype(np.float32)


def _group(bucket: str) -> int:
    """A bucket's number; where two share one, their rows' own buckets tell them apart."""
    return int.from_bytes(hashlib.sha256(bucket.encode()).digest()[:8], "big", signed=True)
