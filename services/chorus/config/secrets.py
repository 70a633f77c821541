"""Secrets that the configuration names the files of, so that no secret is in the configuration itself."""

from __future__ import annotations

from pathlib import Path

from chorus.core.errors import ConfigError

_MAX_BYTES = 4096


def read_secret(path: Path, *, key: str) -> bytes:
    """The secret that a file holds, without white space around it; `key` is the key of the configuration for the file.

    Raises ConfigError, which never shows any of it.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        problem = f"{key}: {path} cannot be read: {error.strerror or error}"
        raise ConfigError(problem, metadata={"keys": key}) from error
    secret = content.strip()
    if not secret or len(content) > _MAX_BYTES:
        raise ConfigError(f"{key}: {path} should hold a secret of at most {_MAX_BYTES} bytes", metadata={"keys": key})
    return secret
