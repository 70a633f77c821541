"""SHA-256 of large files, remembered so that 40 GB aren't read again at each start."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from chorus.core.errors import ModelFileError

_CHUNK_BYTES = 4 << 20
_BUSY_TIMEOUT_S = 5.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS digest (
    path TEXT PRIMARY KEY,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    inode INTEGER NOT NULL,
    sha256 TEXT NOT NULL
)
"""

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and all there are."""


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """Returns the file's SHA-256 in lower-case hex, read in pieces.

    Raises ModelFileError where it can't be read or changes meanwhile.
    """
    try:
        before = path.stat()
        digest = hashlib.sha256()
        done = 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, before.st_size)
        after = path.stat()
    except OSError as error:
        raise ModelFileError(
            f"{path} can't be read: {error.strerror or error}", metadata={"path": str(path)}
        ) from error
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
        raise ModelFileError(f"{path} was changed while it was read; try again", metadata={"path": str(path)})
    return digest.hexdigest()


class DigestCache:
    """Digests by path, size, time of change and inode, in one small SQLite file that several processes may share.

    It is a cache: where its file can't be read or written, digests are computed each time.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def sha256(self, path: Path, progress: Progress | None = None) -> str:
        """As `sha256_of`, without reading the file where it is known and unchanged."""
        path = path.absolute()
        known = self._look_up(path)
        if known is not None:
            return known
        digest = sha256_of(path, progress)
        self.remember(path, digest)
        return digest

    def remember(self, path: Path, sha256: str) -> None:
        """Stores a digest that the caller knows to be that of the file as it is now."""
        with contextlib.suppress(OSError, sqlite3.Error), self._connect(create=True) as connection:
            stat = path.absolute().stat()
            connection.execute(
                "INSERT OR REPLACE INTO digest VALUES (?, ?, ?, ?, ?)",
                (str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino, sha256),
            )

    def forget(self, path: Path) -> None:
        """Drops what is known of a file."""
        with contextlib.suppress(OSError, sqlite3.Error), self._connect(create=False) as connection:
            connection.execute("DELETE FROM digest WHERE path = ?", (str(path.absolute()),))

    def _look_up(self, path: Path) -> str | None:
        with contextlib.suppress(OSError, sqlite3.Error):
            stat = path.stat()
            with self._connect(create=False) as connection:
                row = connection.execute(
                    "SELECT sha256 FROM digest WHERE path = ? AND size = ? AND mtime_ns = ? AND inode = ?",
                    (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino),
                ).fetchone()
            return None if row is None else str(row[0])
        return None

    @contextlib.contextmanager
    def _connect(self, *, create: bool) -> Iterator[sqlite3.Connection]:
        if create:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        elif not self._file.exists():
            raise FileNotFoundError(self._file)
        with contextlib.closing(sqlite3.connect(self._file, timeout=_BUSY_TIMEOUT_S)) as connection, connection:
            if create:
                connection.execute(_SCHEMA)
            yield connection
