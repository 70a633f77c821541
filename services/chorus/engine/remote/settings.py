"""What a remote engine is told: which server, how much of it, and the key that opens it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from chorus.config.remote import RemoteServer
from chorus.core.errors import ConfigError

_MAX_KEY_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """`slots`: requests that one model may have at the server at once. `context_length` 0: as the server has it.

    `poll_s` None: every second, and less often where somebody else pays for it. `answer_s`: how long the server may
    take to answer a question about itself before it counts as gone. `prompt_timeout_s` and `token_timeout_s`: how long
    it may say nothing before the first token of an answer, and after it.
    """

    server: RemoteServer
    api_key: str = field(default="", repr=False)
    slots: int = 4
    max_queue: int = 64
    context_length: int = 0
    poll_s: float | None = None
    answer_s: float = 1.0
    prompt_timeout_s: float = 600.0
    token_timeout_s: float = 60.0


def read_api_key(path: Path) -> str:
    """The key that a file holds. Raises ConfigError, which never shows any of it."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"runner.remote_api_key_file: {path} cannot be read: {error.strerror or error}",
            metadata={"keys": "runner.remote_api_key_file"},
        ) from error
    key = content.decode("latin-1").strip()
    if not key or len(content) > _MAX_KEY_BYTES or not all("!" <= character <= "~" for character in key):
        raise ConfigError(
            f"runner.remote_api_key_file: {path} should hold one line of printable ASCII, the key, and nothing else",
            metadata={"keys": "runner.remote_api_key_file"},
        )
    return key
