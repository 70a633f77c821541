"""Digests that are remembered, and forgotten as soon as a file changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from chorus.core.errors import ModelFileError
from chorus.models import digest
from chorus.models.digest import DigestCache, sha256_of


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose content was really read."""
    read: list[Path] = []

    def counting(path: Path, progress: digest.Progress | None = None) -> str:
        read.append(path)
        return sha256_of(path, progress)

    monkeypatch.setattr(digest, "sha256_of", counting)
    return read


def test_a_file_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"content" * 1000)
    expected = hashlib.sha256(b"content" * 1000).hexdigest()
    assert DigestCache(tmp_path / "state" / "d.sqlite").sha256(file) == expected
    assert DigestCache(tmp_path / "state" / "d.sqlite").sha256(file) == expected
    assert reads == [file]


@pytest.mark.parametrize("change", ["content", "time", "size", "inode"])
def test_whatever_changes_makes_it_read_again(tmp_path: Path, reads: list[Path], change: str) -> None:
    file, cache = tmp_path / "m.gguf", DigestCache(tmp_path / "d.sqlite")
    file.write_bytes(b"content")
    os.utime(file, ns=(1, 1_000))
    cache.sha256(file)
    if change == "inode":
        other = tmp_path / "other"
        other.write_bytes(b"CONTENT")
        os.utime(other, ns=(1, 1_000))
        other.replace(file)
    else:
        file.write_bytes({"content": b"CONTENT", "time": b"content", "size": b"content!"}[change])
        os.utime(file, ns=(1, 1_000 if change == "size" else 2_000))
    assert cache.sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len(reads) == 2


def test_what_is_known_already_need_not_be_read(tmp_path: Path, reads: list[Path]) -> None:
    file, cache = tmp_path / "m.gguf", DigestCache(tmp_path / "d.sqlite")
    file.write_bytes(b"content")
    cache.remember(file, "a" * 64)
    assert cache.sha256(file) == "a" * 64
    cache.forget(file)
    assert cache.sha256(file) == hashlib.sha256(b"content").hexdigest()
    assert len(reads) == 1


def test_a_cache_that_cannot_be_used_is_done_without(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"content")
    expected = hashlib.sha256(b"content").hexdigest()
    (tmp_path / "rubbish").write_bytes(b"this is no database, but long enough to look like one" * 50)
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "rubbish", tmp_path / "file" / "d.sqlite", tmp_path):
        cache = DigestCache(place)
        assert cache.sha256(file) == expected
        cache.remember(file, expected)
        cache.forget(file)


def test_progress_ends_with_everything(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x" * (9 << 20))
    told: list[tuple[int, int]] = []
    sha256_of(file, lambda done, total: told.append((done, total)))
    assert told[-1] == (9 << 20, 9 << 20)
    assert told == sorted(told)


def test_a_file_that_changes_while_it_is_read_has_no_digest(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x" * (9 << 20))

    def meddle(done: int, total: int) -> None:
        os.utime(file, ns=(1, 1))

    with pytest.raises(ModelFileError, match="changed"):
        sha256_of(file, meddle)


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        DigestCache(tmp_path / "d.sqlite").sha256(tmp_path / "missing")
