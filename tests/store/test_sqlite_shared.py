"""Files that several processes open at once."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from chorus.store.sqlite import open_shared


def test_a_file_that_many_make_at_once_is_opened_by_all(tmp_path: Path) -> None:
    for number in range(20):
        path, together = tmp_path / f"{number}.db", threading.Barrier(6)

        def opened(path: Path = path, together: threading.Barrier = together) -> str:
            together.wait()
            with closing(open_shared(path, synchronous="NORMAL", busy_s=20.0)) as db:
                db.execute("CREATE TABLE IF NOT EXISTS one (a)")
                (mode,) = db.execute("PRAGMA journal_mode").fetchone()
            return str(mode)

        with ThreadPoolExecutor(6) as pool:
            assert [future.result() for future in [pool.submit(opened) for _ in range(6)]] == ["wal"] * 6


def test_what_is_no_database_is_told(tmp_path: Path) -> None:
    path = tmp_path / "no.db"
    path.write_text("this is no database, and longer than the header of one" * 3)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        open_shared(path, synchronous="NORMAL", busy_s=0.1)
