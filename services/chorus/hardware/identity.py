"""The id of this machine: the same for every process on it and after every restart."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from chorus.core.errors import ConfigError

MACHINE_ID_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_STATE_FILE = "node-id"
_MACHINE_ID = re.compile(r"[0-9a-f]{32}")
_NODE_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# machine-id(5) asks that the id itself is not shown to others, but hashed with something of the application's own.
_SALT = b"chorus node id, version 1"


def node_id(
    state_dir: Path, *, override: str | None = None, machine_id_files: Sequence[Path] = MACHINE_ID_FILES
) -> str:
    """Returns this machine's id, a lower-case DNS label such as `node-1f0c9a4b7d2e6358`.

    It is `override` if given, else made from the system's machine id, else generated once and kept in `state_dir`.
    Copies of one disk image share a machine id; such machines need an override. Raises ConfigError where the override
    is no DNS label or the state directory cannot be used.
    """
    if override is not None:
        return _checked(override, "the node id")
    for path in machine_id_files:
        machine_id = _read(path)
        if machine_id is not None and _MACHINE_ID.fullmatch(machine_id) and set(machine_id) != {"0"}:
            return "node-" + hmac.new(machine_id.encode(), _SALT, hashlib.sha256).hexdigest()[:16]
    return _kept_id(state_dir / _STATE_FILE)


def _kept_id(path: Path) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write_once(path, "node-" + secrets.token_hex(8))
        return _checked(path.read_text(encoding="utf-8").strip(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"this machine has no machine id, and none can be kept in {path}: {error}; set runner.node_id",
            metadata={"keys": "runner.node_id"},
        ) from error


def _write_once(path: Path, text: str) -> None:
    """Two processes that start at once must agree: whoever links first wins, and nobody reads half an id."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _checked(text: str, what: str) -> str:
    if not _NODE_ID.fullmatch(text):
        raise ConfigError(
            f"{what} should be 1 to 63 lower-case letters, digits and dashes, but is {text[:80]!r}",
            metadata={"keys": "runner.node_id"},
        )
    return text


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
