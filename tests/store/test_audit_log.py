"""The audit log's files: over restarts, crashes, full disks and the hands of others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chorus.core.audit import DeedKind
from chorus.core.errors import ConfigError
from chorus.store.audit_log import HEAD_FILE, AuditLog, audit_files, entries, read_head, verify_log

LARGE = 1 << 30


@contextmanager
def opened(directory: Path, rotate_bytes: int = LARGE) -> Iterator[AuditLog]:
    log = AuditLog(directory, rotate_bytes=rotate_bytes, wall=lambda: 5.0)
    try:
        yield log
    finally:
        log.close()


def note(directory: Path, *targets: str, rotate_bytes: int = LARGE) -> None:
    """One life of a service that notes each of them."""
    with opened(directory, rotate_bytes) as log:
        for target in targets:
            log.note(DeedKind.MODEL_LOADED, by="me", target=target)
            assert log.flush()


def targets(directory: Path) -> list[str]:
    return [entry.deed.target for entry in entries(directory) if entry.deed.kind == DeedKind.MODEL_LOADED]


def problems(directory: Path) -> list[str]:
    return [str(problem) for problem in verify_log(directory).problems]


def test_several_lives_are_one_chain(tmp_path: Path) -> None:
    note(tmp_path, "a", "b")
    note(tmp_path, "c")
    assert targets(tmp_path) == ["a", "b", "c"]
    report = verify_log(tmp_path)
    assert report.problems == []
    assert report.count == 5  # each life begins with one
    assert read_head(tmp_path) == report.head
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_a_new_file_goes_on_with_the_chain(tmp_path: Path) -> None:
    note(tmp_path, *"abcdef", rotate_bytes=300)
    assert len(audit_files(tmp_path)) > 2
    assert problems(tmp_path) == []
    assert targets(tmp_path) == list("abcdef")
    audit_files(tmp_path)[1].unlink()
    assert "are missing before it" in problems(tmp_path)[0]


def test_a_torn_line_is_said_and_the_next_life_cuts_it_off_and_says_so_too(tmp_path: Path) -> None:
    note(tmp_path, "a")
    with audit_files(tmp_path)[0].open("ab") as file:
        file.write(b'{"n":3,"at"')
    assert "is torn after 11 bytes" in problems(tmp_path)[0]
    note(tmp_path, "b")
    assert problems(tmp_path) == []
    told = [entry.deed.facts for entry in entries(tmp_path) if entry.deed.kind == DeedKind.LOG_OPENED]
    assert told[0] == {}
    assert told[1]["torn_bytes"] == 11


@pytest.mark.parametrize("again", [False, True], ids=["at once", "after another life"])
def test_an_end_that_was_taken_away_or_changed_stays_found(tmp_path: Path, again: bool) -> None:
    for name, change in (("short", lambda lines: lines[:-1]), ("changed", lambda lines: [*lines[:-1], lines[-2]])):
        directory = tmp_path / name
        note(directory, "a", "b")
        file = audit_files(directory)[0]
        file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))
        if again:
            note(directory, "c")
        assert problems(directory)


def test_a_log_whose_head_is_gone_is_not_whole_and_the_next_life_notes_it(tmp_path: Path) -> None:
    note(tmp_path, "a")
    (tmp_path / HEAD_FILE).unlink()
    assert "head" in problems(tmp_path)[0]
    note(tmp_path, "b")
    assert [entry.deed.facts.get("head") for entry in entries(tmp_path)] == [None, None, "missing", None]


def test_two_services_cannot_write_one_log(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ConfigError, match="another process writes"):
        AuditLog(tmp_path, rotate_bytes=LARGE)
    note(tmp_path, "free again")


def test_a_folder_that_cannot_be_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't be written"):
        AuditLog(tmp_path / "file", rotate_bytes=LARGE)


def test_what_a_full_disk_refuses_is_written_once_there_is_room(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        assert log.flush()
        kept = log._file
        log._file = os.open("/dev/full", os.O_WRONLY)
        log.note(DeedKind.MODEL_LOADED, by="me", target="a")
        assert not log.flush()
        log._file, full = kept, log._file
        log.note(DeedKind.MODEL_LOADED, by="me", target="b")
        while not log.flush():
            pass
        os.close(full)
    assert targets(tmp_path) == ["a", "b"]
    assert problems(tmp_path) == []


WRITER = """
import sys
from pathlib import Path
from chorus.core.audit import DeedKind
from chorus.store.audit_log import AuditLog

log, number = AuditLog(Path(sys.argv[1]), rotate_bytes=2000), 0
while True:
    number += 1
    log.note(DeedKind.MODEL_LOADED, by="me", target=str(number))
    if log.flush():
        print(number, flush=True)
"""


def test_a_killed_service_loses_nothing_that_it_waited_for(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        told += map(int, process.stdout.read().split())
    note(tmp_path, "after")
    assert problems(tmp_path) == []
    found = targets(tmp_path)
    assert found[-1] == "after"
    assert [int(target) for target in found[:-1]][: len(told)] == told
