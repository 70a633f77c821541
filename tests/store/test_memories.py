"""What a coordinator remembers is there after a restart; a file that can't be understood is begun anew."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from chorus.core.placement import KnownModel, Patterns
from chorus.store.memories import Memories, MemoryFile
from chorus.testing.engine_fake import fake_artifact


@pytest.fixture
def memories() -> Memories:
    patterns = Patterns()
    for number in range(4):
        patterns.asked("a", 1e9 + 86_400.0 * number)
        patterns.asked("b", 1e9 + 86_400.0 * number + 30.0)
    return Memories(patterns.remembered(1e9 + 4 * 86_400.0), (KnownModel(fake_artifact("m.gguf"), 1e9),))


def test_what_was_written_last_is_read_by_another_life(tmp_path: Path, memories: Memories) -> None:
    path = tmp_path / "deep" / "memory.sqlite"
    assert MemoryFile(path).read() == Memories()
    MemoryFile(path).write(Memories())
    MemoryFile(path).write(memories)
    assert MemoryFile(path).read() == memories
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["no database", "another version", "not understood"])
def test_a_file_that_can_not_be_understood_is_begun_anew(tmp_path: Path, memories: Memories, damage: str) -> None:
    path = tmp_path / "memory.sqlite"
    MemoryFile(path).write(memories)
    if damage == "no database":
        path.write_bytes(b"nothing of the kind" * 1000)
    else:
        with closing(sqlite3.connect(path)) as db, db:
            change = (
                "PRAGMA user_version = 99" if damage == "another version" else "UPDATE memories SET content = '{}x'"
            )
            db.execute(change)
    assert MemoryFile(path).read() == Memories()
    MemoryFile(path).write(memories)
    assert MemoryFile(path).read() == memories


def test_a_file_that_can_not_be_had_says_so(tmp_path: Path, memories: Memories) -> None:
    (tmp_path / "memory").mkdir()
    with pytest.raises(OSError, match="memory"):
        MemoryFile(tmp_path / "memory").write(memories)
