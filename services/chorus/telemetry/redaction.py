"""What must not reach a log: texts of prompts and answers unless asked for, keys never.

Fields are judged by their names, so a log call passes texts and keys under honest ones. A value that is no plain datum,
such as a whole request, is logged as the name of its type, because its text would hold the prompt. What other libraries
log is free text; there only what looks like a key can be taken out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from datetime import date, timedelta
from enum import Enum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from pathlib import PurePath
from uuid import UUID

TEXT_FIELDS = frozenset({"prompt", "text", "content", "messages", "completion", "answer", "arguments"})
# A token may be a piece of an answer or a credential; as the latter it stays hidden in either case.
SECRET_FIELDS = frozenset(
    {"api_key", "apikey", "token", "secret", "authorization", "password", "passphrase", "private_key", "cookie"}
)

_MAX_DEPTH = 8
_MAX_LENGTH = 8192  # characters of one value: a line of log stays a line
_PLAIN = (PurePath, date, timedelta, UUID, IPv4Address, IPv6Address)
_KEY_IN_TEXT = re.compile(
    r"(?i:\b(?:bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,})"
    r"|\b(?:sk|hf|ghp|gho|xox[abp])[-_][A-Za-z0-9_-]{8,}"
    r"|(?<=://)[^/\s:@]{1,200}:[^/\s@]{1,200}(?=@)"
    r"|(?i:(?<=api_key=)|(?<=token=))[^&\s]+"
    r"|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,20}PRIVATE KEY-----|\Z)",
    re.DOTALL,
)


def redact(event: MutableMapping[str, object], *, prompts: bool) -> None:
    """Makes the values of `event` plain data, in place: secrets become lengths, and so do texts unless `prompts`."""
    for name, value in event.items():
        if name != "event":
            event[name] = _plain(name, value, prompts, _MAX_DEPTH)


def without_keys(value: object) -> object:
    """Returns free text, or plain data with text in it, less what looks like a key or a credential in a URL."""
    if isinstance(value, str):
        return _KEY_IN_TEXT.sub("<redacted>", value)
    if isinstance(value, dict):
        return {name: without_keys(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_keys(item) for item in value]
    return value


def _plain(name: str, value: object, prompts: bool, depth: int) -> object:
    if value is None or isinstance(value, bool):
        return value
    if _is_named(name, SECRET_FIELDS) or (not prompts and _is_named(name, TEXT_FIELDS)):
        return _length(value)
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, int | float):
        return value
    if isinstance(value, str):
        return value if len(value) <= _MAX_LENGTH else f"{value[:_MAX_LENGTH]}… <{len(value)} characters>"
    if isinstance(value, Mapping) and depth:
        return {str(key): _plain(str(key), item, prompts, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and depth:
        return [_plain(name, item, prompts, depth - 1) for item in value]
    if isinstance(value, _PLAIN):
        return str(value)
    if isinstance(value, BaseException):
        return without_keys(f"{type(value).__name__}: {value}"[:_MAX_LENGTH])
    return f"<{type(value).__name__}>"


@lru_cache(maxsize=1024)
def _is_named(name: str, fields: frozenset[str]) -> bool:
    """Whether `name` is one of `fields` or ends in one, as `system_prompt` and `hub-token` do."""
    lowered = name.lower().replace("-", "_")
    return lowered in fields or ("_" in lowered and any(lowered.endswith(f"_{field}") for field in fields))


def _length(value: object) -> str:
    if isinstance(value, str):
        return f"<{len(value)} characters>"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, list | tuple | set | frozenset | Mapping):
        return f"<{len(value)} items>"
    return "<hidden>"
