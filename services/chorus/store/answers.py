"""Answers in SQLite, in a file or in memory, with the vectors of their questions beside them.

Synchronous, and used from one thread at a time (`AnswerStore` sees to it). Times are seconds since the epoch, given by
the caller. The signs of each question's vector stand in a small table of their own, written with the answer; what
finds the nearest (`core/cache/nearest.py`) is made of them, a batch at a time while the open file is used already.
A file is no contract: one of another version of this schema, or one that is damaged, is made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from chorus.core.cache.nearest import Nearest, Vector, signs
from chorus.store.sqlite import open_file

_SCHEMA = 2
_CREATE = """
CREATE TABLE answers (
  id INTEGER PRIMARY KEY,
  key TEXT NOT NULL,
  sha256 TEXT NOT NULL,
  caller TEXT NOT NULL,
  tokens INTEGER NOT NULL,
  size INTEGER NOT NULL,
  made REAL NOT NULL,
  used REAL NOT NULL,
  question TEXT,
  bucket TEXT,
  vector BLOB,
  right INTEGER NOT NULL DEFAULT 0,
  wrong INTEGER NOT NULL DEFAULT 0,
  answer BLOB NOT NULL, -- last, since the columns after a long one are slow to come by
  UNIQUE (key, sha256)
);
CREATE INDEX by_use ON answers (used);
CREATE INDEX by_caller ON answers (caller, size);
CREATE TABLE signs (
  id INTEGER PRIMARY KEY,
  bucket INTEGER NOT NULL,
  bits BLOB NOT NULL
);
"""
# Signs read at once: some milliseconds, for which whoever asks has to wait.
_LOADED_AT_ONCE = 4096
CANDIDATES = 64
"""Questions whose vectors are looked at, after their signs."""
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
    """The answers of one file; `path` None keeps them in memory. Raises OSError where the file can't be had.

    It is open at once, however much is in it; `near` finds the questions that were there as `load_more` gets to them.
    """

    def __init__(self, path: Path | None, *, max_entries: int, max_bytes: int) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._db = open_file(path, schema=_SCHEMA, create=_CREATE, table="answers")
        self._nearest: dict[int, Nearest] = {}
        self.entries, self.size = self._db.execute("SELECT count(*), coalesce(sum(size), 0) FROM answers").fetchone()
        (self._load_below,) = self._db.execute("SELECT coalesce(max(id), 0) + 1 FROM signs").fetchone()

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def load_more(self) -> bool:
        """Makes some more questions of an old file known to `near`, the newest first; False: that was the last."""
        rows = self._db.execute(
            "SELECT id, bucket, bits FROM signs WHERE id < ? ORDER BY id DESC LIMIT ?",
            (self._load_below, _LOADED_AT_ONCE),
        ).fetchall()
        alike: dict[int, list[tuple[int, int, bytes]]] = {}
        for row in rows:
            alike.setdefault(len(row[2]) // 8, []).append(row)
        for words, loaded in alike.items():
            numbers, groups, bits = zip(*loaded, strict=True)
            self._of_length(words).add_all(
                numbers, groups, np.frombuffer(b"".join(bits), np.uint64).reshape(len(loaded), words)
            )
        if rows:
            self._load_below = rows[-1][0]
        return len(rows) == _LOADED_AT_ONCE

    def find(self, key: str, sha256s: Sequence[str] | None, *, since: float) -> Kept | None:
        """The newest answer to a request by one of these artifacts (None: whichever), made after `since`."""
        row = self._db.execute(
            "SELECT id, sha256, answer, tokens, made FROM answers WHERE key = ? AND made > ? "
            "AND (? IS NULL OR sha256 IN (SELECT value FROM json_each(?))) ORDER BY made DESC LIMIT 1",
            (key, since, *(2 * (None if sha256s is None else json.dumps(sha256s),))),
        ).fetchone()
        return None if row is None else Kept(*row)

    def near(self, bucket: str, sha256s: Sequence[str], vector: Vector, *, since: float, limit: int) -> list[Kept]:
        """The answers to the nearest questions of a bucket, the nearest first."""
        bits = signs(vector)
        nearest = self._nearest.get(len(bits))
        ids = nearest.near(group_of(bucket), bits, CANDIDATES) if nearest is not None else []
        if not ids:
            return []
        rows = self._db.execute(
            "SELECT id, vector FROM answers WHERE id IN (SELECT value FROM json_each(?)) AND bucket = ? AND made > ? "
            "AND sha256 IN (SELECT value FROM json_each(?))",
            (json.dumps(ids), bucket, since, json.dumps(sha256s)),
        ).fetchall()
        if not rows:
            return []
        alike = dict(zip((row for row, _ in rows), cosines([blob for _, blob in rows], vector), strict=True))
        nearest_ids = sorted(alike, key=lambda row: -alike[row])[:limit]
        whole = self._db.execute(
            "SELECT id, sha256, answer, tokens, made, question, right, wrong FROM answers "
            "WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(nearest_ids),),
        ).fetchall()
        found = [replace(Kept(*row), cosine=alike[row[0]]) for row in whole]
        return sorted(found, key=lambda kept: -kept.cosine)

    def used(self, used: Mapping[int, float]) -> None:
        """Answers were given, by id, at these times: they are not the next ones to make room."""
        if not used:
            return
        with self._db:
            self._db.executemany("UPDATE answers SET used = ? WHERE id = ?", [(now, row) for row, now in used.items()])

    def judged(self, row: int, *, right: bool) -> None:
        """A hit of it was compared with a new answer."""
        with self._db:
            self._db.execute(
                "UPDATE answers SET right = right + ?, wrong = wrong + ? WHERE id = ?", (right, not right, row)
            )

    def put(self, new: NewAnswer, now: float) -> int:
        """Keeps an answer in place of an earlier one to the same request; returns how many, least used, made room."""
        size = size_of(new)
        if size > self._max_bytes:
            return 0
        with self._db:
            self._drop(
                self._db.execute("SELECT id, size FROM answers WHERE key = ? AND sha256 = ?", (new.key, new.sha256))
            )
            row = self._insert(new, size, now)
            self.entries, self.size = self.entries + 1, self.size + size
            gone = self._make_room()
        if new.vector is not None and new.bucket is not None:
            bits = signs(new.vector)
            self._of_length(len(bits)).add(row, group_of(new.bucket), bits)
        return gone

    def _insert(self, new: NewAnswer, size: int, now: float) -> int:
        """Writes an answer and the signs of its question; returns its id."""
        vector = None if new.vector is None or new.bucket is None else new.vector.astype(np.float16).tobytes()
        bucket = None if vector is None else new.bucket
        cursor = self._db.execute(
            "INSERT INTO answers (key, sha256, caller, tokens, size, made, used, question, bucket, vector, answer) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (new.key, new.sha256, new.caller, new.tokens, size, now, now, new.question, bucket, vector, new.answer),
        )
        row = cursor.lastrowid
        assert row is not None, "SQLite numbers every row"
        if new.vector is not None and new.bucket is not None:
            told = (row, group_of(new.bucket), signs(new.vector).tobytes())
            self._db.execute("INSERT INTO signs (id, bucket, bits) VALUES (?, ?, ?)", told)
        return row

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

    def _make_room(self) -> int:
        if self.entries <= self._max_entries and self.size <= self._max_bytes:
            return 0
        entries, size = (bound - int(bound * _EVICTED_AT_ONCE) for bound in (self._max_entries, self._max_bytes))
        left, gone = self.size, list[tuple[int, int]]()
        # The newest is the last one and stays.
        for row in self._db.execute("SELECT id, size FROM answers ORDER BY used, id LIMIT ?", (self.entries - 1,)):
            if self.entries - len(gone) <= entries and left <= size:
                break
            gone.append(row)
            left -= row[1]
        return self._drop(gone)

    def _drop(self, rows: Iterable[tuple[int, int]]) -> int:
        """Deletes rows, given by id and size; returns how many."""
        gone = list(rows)
        ids = [(row,) for row, _ in gone]
        self._db.executemany("DELETE FROM answers WHERE id = ?", ids)
        self._db.executemany("DELETE FROM signs WHERE id = ?", ids)
        for row, size in gone:
            self.entries, self.size = self.entries - 1, self.size - size
            for nearest in self._nearest.values():
                nearest.remove(row)
        return len(gone)

    def _of_length(self, words: int) -> Nearest:
        """What finds the nearest vectors of so many words of signs."""
        if words not in self._nearest:
            self._nearest[words] = Nearest(words)
        return self._nearest[words]


def size_of(new: NewAnswer) -> int:
    """The bytes that it counts for."""
    return len(new.answer) + len(new.question or "") + _ROW_BYTES


def cosines(blobs: Sequence[bytes], vector: Vector) -> list[float]:
    """Those of kept vectors of one length to this one. Together: one by one, they take as long as the scan took."""
    vectors = np.frombuffer(b"".join(blobs), np.float16).reshape(len(blobs), -1)
    found: list[float] = (vectors.astype(np.float32) @ vector).tolist()
    return found


def group_of(bucket: str) -> int:
    """A bucket's number; where two share one, their rows' own buckets tell them apart."""
    return int.from_bytes(hashlib.sha256(bucket.encode()).digest()[:8], "big", signed=True)
