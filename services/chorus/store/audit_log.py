"""The audit log of one service: a folder of files that are only ever appended to.

000000000001.jsonl   entries from that number on, one a line; a new file is begun where one has grown long enough
head                 the number and SHA-256 of the last entry, so that its removal is found, too

What is noted is written by a thread, many entries at once: what a crash of the machine takes is what was noted in the
last `GATHER_S`, unless `flush` was waited for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from chorus.config import AuditSettings
from chorus.core.audit import Deed, DeedKind, Fact, NoTrail, Trail
from chorus.core.audit.chain import Entry, Head, Report, append, digest, read, verify
from chorus.core.errors import ConfigError, InvalidRequestError
from chorus.telemetry.logs import get_logger

GATHER_S = 0.5
BACKLOG_MAX = 20_000
"""So many deeds wait while the disk takes none; further ones are lost, and an entry says how many."""
HEAD_FILE = "head"
_LOCK_FILE = "lock"
_PATTERN = "[0-9]*.jsonl"
_FLUSH_S = 10.0
_BLOCK_BYTES = 1 << 16

_log = get_logger()


def open_trail(settings: AuditSettings, name: str, *, beside: Path | None = None) -> Trail:
    """The audit log of the service `name` as configured, else in `beside`, else none. Raises ConfigError."""
    directory = settings.dir if settings.dir is not None else beside
    if directory is None:
        return NoTrail()
    return AuditLog(directory / name, rotate_bytes=settings.rotate_mib << 20)


def audit_files(directory: Path) -> list[Path]:
    """The files of a log in their order; none where there is no log."""
    return sorted(directory.glob(_PATTERN))


def read_head(directory: Path) -> Head | None:
    """The head beside the files; None where it is missing or damaged."""
    try:
        return Head.parse((directory / HEAD_FILE).read_text("ascii"))
    except (OSError, ValueError, InvalidRequestError):
        return None


def find_logs(directory: Path) -> list[Path]:
    """The logs that are in `directory`, itself or its folders, by name."""
    return [path for path in (directory, *sorted(directory.glob("*/"))) if audit_files(path)]


def verify_log(directory: Path, *, known: Head | None = None) -> Report:
    """Checks a log, while it is written or not. Raises OSError."""
    head = read_head(directory)  # first: what is written meanwhile comes after it
    return verify(((path.name, _lines(path)) for path in audit_files(directory)), head=head, known=known)


def entries(directory: Path) -> Iterator[Entry]:
    """The entries of a log in their order, but for those that can't be read. Raises OSError."""
    for path in audit_files(directory):
        for line in _lines(path):
            with contextlib.suppress(ValueError):
                yield read(line)


class AuditLog:
    """A Trail that is kept in `directory`, by this process alone. `wall` is seconds since 1970.

    May be used from any thread. Raises ConfigError where the folder can't be used, or another process writes there.
    """

    def __init__(self, directory: Path, *, rotate_bytes: int, wall: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._rotate_bytes = rotate_bytes
        self._wall = wall
        self._news = threading.Condition()
        self._waiting: deque[Deed] = deque()
        self._lost = 0
        self._noted = self._written = 0
        self._closing = self._hurry = self._failing = False
        self._file = -1
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._held = self._lock()
            self._head, found = self._open()
            self._head_file = os.open(directory / HEAD_FILE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"the audit log {directory} can't be written: {error.strerror or error}") from error
        self._waiting.append(Deed(wall(), "", DeedKind.LOG_OPENED, facts=found))
        self._noted = 1
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def note(self, kind: DeedKind, *, by: str, target: str = "", **facts: Fact) -> None:
        """It has been done, just now."""
        deed = Deed(self._wall(), by, kind, target, facts)
        with self._news:
            if len(self._waiting) >= BACKLOG_MAX:
                self._lost += 1
                return
            self._waiting.append(deed)
            self._noted += 1
            self._news.notify_all()

    def flush(self) -> bool:
        """Waits until what was noted so far is on disk; whether it is."""
        with self._news:
            wanted, self._hurry = self._noted, True
            self._news.notify_all()
            return self._news.wait_for(lambda: self._written >= wanted or self._failing, _FLUSH_S) and not self._failing

    def close(self) -> None:
        """Writes what is left, and ends. May be called again."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        self._thread.join(_FLUSH_S)

    # --- beginning --------------------------------------------------------------------------------------------------

    def _lock(self) -> FileLock:
        lock = FileLock(self._directory / _LOCK_FILE, timeout=0, mode=0o600, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"another process writes the audit log {self._directory} already; each service needs its own"
            ) from None
        return lock

    def _open(self) -> tuple[Head, dict[str, Fact]]:
        """Goes on where the log ends; what is strange about its end is told by the entry that follows."""
        files, kept, found = audit_files(self._directory), read_head(self._directory), dict[str, Fact]()
        last = None
        for path in reversed(files):
            found |= _mend(path)
            if line := _last_line(path):
                last = _head_of(path, line.removesuffix(b"\n"), kept)
                break
        if files and last is not None and kept is None:
            found["head"] = "missing"
        if kept is not None and (last is None or last.sequence <= kept.sequence) and last != kept and kept.sequence:
            # It goes on after what should be there, so that the gap stays for everybody to find.
            found["end"] = "missing" if last is None or last.sequence < kept.sequence else "changed"
            last = kept
        if found:
            _log.error("audit.damaged", directory=str(self._directory), **found)
        head = last if last is not None else Head()
        self._file = self._append_to(files[-1] if files else self._path(head.sequence + 1))
        return head, found

    def _append_to(self, path: Path) -> int:
        made = not path.exists()
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if made:
            _sync_directory(self._directory)
        return file

    def _path(self, sequence: int) -> Path:
        return self._directory / f"{sequence:012}.jsonl"

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._closing)
                # Many requests a second are one write and one sync, and not one each.
                self._news.wait_for(lambda: self._hurry or self._closing, GATHER_S)
                deeds, closing = list(self._waiting), self._closing
                lost = self._lost
            try:
                self._write(deeds, lost)
            except OSError as error:
                if not self._failing:
                    _log.error("audit.not_written", directory=str(self._directory), why=error.strerror or str(error))
                self._done(0, 0, failing=True)
            else:
                self._done(len(deeds), lost, failing=False)
            if closing:
                break
        os.close(self._file)
        os.close(self._head_file)
        self._held.release()

    def _done(self, written: int, lost: int, *, failing: bool) -> None:
        with self._news:
            for _ in range(written):
                self._waiting.popleft()
            self._written += written
            self._lost -= lost
            self._failing = failing
            self._hurry = self._hurry and self._written < self._noted and not failing
            self._news.notify_all()

    def _write(self, deeds: list[Deed], lost: int) -> None:
        if lost:
            deeds = [*deeds, Deed(self._wall(), "", DeedKind.LOG_LOST, facts={"count": lost})]
        head, lines = self._head, bytearray()
        for deed in deeds:
            head, line = append(head, deed)
            lines += line
        if not lines:
            return
        before = os.fstat(self._file).st_size
        if before >= self._rotate_bytes:
            file = self._append_to(self._path(self._head.sequence + 1))
            os.close(self._file)
            self._file, before = file, 0
        try:
            _write_all(self._file, bytes(lines))
            os.fsync(self._file)
        except OSError:
            # What got there is written once more with the next try; twice would be a break.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise
        self._head = head
        # In place: as short as it is, it is within one sector, and either the old one or the new one.
        os.pwrite(self._head_file, f"{head.sequence:019}:{head.sha256}\n".encode("ascii"), 0)
        os.fsync(self._head_file)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _mend(path: Path) -> dict[str, Fact]:
    """Cuts a torn line off, which a crash left; what it was is told."""
    torn = _last_line(path)
    if not torn or torn.endswith(b"\n"):
        return {}
    os.truncate(path, path.stat().st_size - len(torn))
    return {"torn_bytes": len(torn), "torn_sha256": hashlib.sha256(torn).hexdigest()}


def _last_line(path: Path) -> bytes:
    """The last line of a file as it is, with its end if it has one; empty where there is none."""
    with path.open("rb") as file:
        at, tail = file.seek(0, os.SEEK_END), b""
        while at > 0 and b"\n" not in tail[:-1]:
            step = min(_BLOCK_BYTES, at)
            at -= step
            file.seek(at)
            tail = file.read(step) + tail
    return tail[tail.rfind(b"\n", 0, -1) + 1 :]


def _head_of(path: Path, line: bytes, kept: Head | None) -> Head:
    try:
        return Head(read(line).sequence, digest(line))
    except ValueError as error:
        if kept is None:
            raise ConfigError(
                f"the audit log ends with a line that {error} ({path}), and its head is missing; move the folder "
                "away, and a new log begins"
            ) from None
        return Head(kept.sequence, digest(line))


def _sync_directory(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
