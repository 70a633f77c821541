"""SQLite files: those that processes share, and those that are no contract.

One of the latter that is of another version of its schema, or damaged, is made anew.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import suppress
from pathlib import Path

_AGAIN_S = 0.01


def open_shared(path: Path, *, synchronous: str, busy_s: float) -> sqlite3.Connection:
    """Opens, or makes, a file that other processes write to as well, for whose writes each waits `busy_s` at most.

    Only its owner may read it. Raises OSError, sqlite3.Error.
    """
    path.touch(mode=0o600)
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=busy_s)
    try:
        # Two that make it at once are in each other's way here, and the timeout isn't for the change to this mode.
        until = time.monotonic() + busy_s
        while not _made_wal(db):
            if time.monotonic() > until:
                raise sqlite3.OperationalError("database is locked")
            time.sleep(_AGAIN_S)
        db.execute(f"PRAGMA synchronous = {synchronous}")
    except BaseException:
        db.close()
        raise
    return db


def open_file(path: Path | None, *, schema: int, create: str, table: str) -> sqlite3.Connection:
    """Opens the file of this `schema`, with `table` in it, or makes it by `create`; `path` None is in memory.

    Only its owner may read it. Raises OSError where it can't be had.
    """
    if path is None:
        return _made(sqlite3.connect(":memory:", check_same_thread=False), schema, create)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    try:
        db = sqlite3.connect(path, check_same_thread=False)
        if db.execute("PRAGMA user_version").fetchone()[0] == schema:
            db.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608 - a name of our own
            return _quick(db)
        db.close()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise OSError(f"{path}: {error}") from error
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).unlink()
    path.touch(mode=0o600)
    return _made(_quick(sqlite3.connect(path, check_same_thread=False)), schema, create)


def _made_wal(db: sqlite3.Connection) -> bool:
    try:
        db.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        return False
    return True


def _made(db: sqlite3.Connection, schema: int, create: str) -> sqlite3.Connection:
    db.executescript(create + f"PRAGMA user_version = {schema};")
    return db


def _quick(db: sqlite3.Connection) -> sqlite3.Connection:
    # What a crash of the machine may lose is the newest, which only costs time to have again.
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    return db
