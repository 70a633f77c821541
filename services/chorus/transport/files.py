"""Writing keys and certificates so that nobody ever finds half of one, and no stranger ever reads a key."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from chorus.core.errors import CertificateError

KEY_MODE = 0o600
CERTIFICATE_MODE = 0o644
DIRECTORY_MODE = 0o700


def make_directory(path: Path) -> None:
    """Makes `path` and what is missing above it, closed to others. An existing directory is left as it is."""
    try:
        path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise _failed("make the directory", path, error) from error


def write_new(path: Path, content: bytes, mode: int, *, replace: bool) -> None:
    """Writes a whole file under a temporary name, then gives it its own.

    The file has `mode` from its first byte on, whatever the umask. Raises CertificateError where `path` exists and
    `replace` is not set, even if it came into being meanwhile.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        _write_exclusive(temporary, content, mode)
        try:
            if replace:
                temporary.replace(path)
            else:
                path.hardlink_to(temporary)  # unlike a rename, this fails where the name is taken
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError:
        raise CertificateError(f"{path} exists already; --force replaces it") from None
    except OSError as error:
        raise _failed("write", path, error) from error


def write_new_directory(path: Path, contents: Mapping[str, tuple[bytes, int]], *, replace: bool) -> None:
    """Makes a directory with these files (name -> content, mode) all at once.

    Raises CertificateError where `path` has files already and `replace` is not set. Replacing goes file by file, in the
    mapping's order, since a directory with files in it cannot be renamed over.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        if replace and path.is_dir():
            for name, (content, mode) in contents.items():
                write_new(path / name, content, mode, replace=True)
            return
        temporary.mkdir(mode=DIRECTORY_MODE)
        try:
            for name, (content, mode) in contents.items():
                _write_exclusive(temporary / name, content, mode)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if path.is_dir() and any(path.iterdir()):
            raise CertificateError(f"{path} exists already; --force replaces what is in it") from None
        raise _failed("write", path, error) from error


def _write_exclusive(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, KEY_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            with contextlib.suppress(AttributeError):  # Windows has no modes of this kind
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _failed(what: str, path: Path, error: OSError) -> CertificateError:
    return CertificateError(f"cannot {what} {path}: {error.strerror or error}")
