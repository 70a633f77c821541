"""What every source comes down to: a file's name, what is known of it, and a way to get it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from chorus.core.errors import DownloadError
from chorus.core.fitting.suggest import describe_bytes
from chorus.models.progress import PullPhase, Reporter

_CHUNK_BYTES = 4 << 20
_SPARE_BYTES = 64 << 20

Fetch = Callable[[Path, Reporter], None]
"""Puts the whole file at a path, going on from what lies there already where it can. Raises DownloadError."""


class ImportMode(StrEnum):
    """What happens to a file that lies on this machine already."""

    LINK = "link"  # a hard link, which takes no space; a copy where that isn't possible
    COPY = "copy"
    REFERENCE = "reference"  # the file stays where it is, and is missed if it goes away


@dataclass(frozen=True, slots=True)
class Offer:
    """A file that a source has. `local` is set where it lies on this machine as one whole file."""

    file: str
    fetch: Fetch
    size_bytes: int | None = None
    sha256: str | None = None
    local: Path | None = None


def local_offer(path: Path, file: str, mode: ImportMode, *, sha256: str | None = None) -> Offer:
    """The offer of a file of this machine. Raises DownloadError where it is none."""
    try:
        path = path.resolve(strict=True)
        if not path.is_file():
            raise DownloadError(f"{path} is not a file")
        size = path.stat().st_size
    except OSError as error:
        raise DownloadError(f"{path} can't be read: {error.strerror or error}") from error
    except RuntimeError:
        raise DownloadError(f"{path} is a link that leads back to itself") from None
    return Offer(
        file,
        lambda partial, reporter: bring_in(path, partial, reporter, link=mode is ImportMode.LINK),
        size_bytes=size,
        sha256=sha256,
        local=path,
    )


def bring_in(path: Path, partial: Path, reporter: Reporter, *, link: bool) -> None:
    """Hard-links or copies `path` to `partial`, replacing what is there."""
    partial.unlink(missing_ok=True)
    if link:
        try:
            os.link(path, partial)
        except OSError:  # another file system, one without links, or a file of somebody else's
            pass
        else:
            return
    try:
        size = path.stat().st_size
        ensure_space(partial.parent, size)
        with path.open("rb") as source, partial.open("wb") as target:
            done = 0
            while chunk := source.read(_CHUNK_BYTES):
                keep_going(reporter)
                target.write(chunk)
                done += len(chunk)
                reporter.report(PullPhase.COPYING, done, size)
    except OSError as error:
        raise DownloadError(f"copying {path} failed: {error.strerror or error}") from error


def ensure_space(folder: Path, needed_bytes: int) -> None:
    """Raises DownloadError where the file system of `folder` hasn't room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if needed_bytes + _SPARE_BYTES > free:
        raise DownloadError(
            f"{describe_bytes(needed_bytes)} are needed, but only {describe_bytes(free)} are free in {folder}; "
            "make room, or name a folder on a larger disk by runner.models_dir"
        )


def keep_going(reporter: Reporter) -> None:
    """Raises DownloadError where another process has taken over this pull."""
    if reporter.stop.is_set():
        raise DownloadError("another process took over this download, since this one seemed dead; try again")
