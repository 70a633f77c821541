"""llama.cpp's own log, as events of structlog: its errors are warnings here, the rest is quieter."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chorus.telemetry.logs import get_logger

_log = get_logger()
_DEBUG, _WARN, _ERROR, _CONTINUED = 1, 3, 4, 5  # ggml's own numbers; 2 is information
_local = threading.local()
_BUFFER_SIZE = re.compile(r"(\S+)\s+(\S+) buffer size\s*=\s*([\d.]+) MiB")
_callback: Any = None


def attach(functions: Any) -> None:
    """Makes llama.cpp log here. Called once, when its library is loaded."""
    global _callback
    _callback = functions.llama_log_callback(_receive)
    functions.llama_log_set(_callback, None)


@contextlib.contextmanager
def last_errors() -> Iterator[list[str]]:
    """Collects the errors that llama.cpp logs in this thread, to say why something failed."""
    errors: list[str] = []
    _local.errors = errors
    try:
        yield errors
    finally:
        _local.errors = None


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory that llama.cpp allocated: where, such as `CPU_Mapped`, and for what: `model`, `KV`, `compute`."""

    device: str
    purpose: str
    size_bytes: int


@contextlib.contextmanager
def buffers() -> Iterator[list[Buffer]]:
    """Collects the buffers that llama.cpp allocates in this thread, as its log tells them."""
    found: list[Buffer] = []
    _local.buffers = found
    try:
        yield found
    finally:
        _local.buffers = None


def _receive(level: int, text: bytes | None, _: object) -> None:
    """Called by C in any thread, with pieces of lines; must never raise."""
    if level == _DEBUG:  # thousands of lines a load, of use only to llama.cpp's own authors
        _local.level = level
        return
    with contextlib.suppress(Exception):
        if level != _CONTINUED:
            _flush()
            _local.level = level
        elif getattr(_local, "level", _DEBUG) == _DEBUG:
            return
        piece = (text or b"").decode("utf-8", "replace")
        _local.line = getattr(_local, "line", "") + piece
        if piece.endswith("\n") or len(_local.line) > 2000:
            _flush()


def _flush() -> None:
    line = getattr(_local, "line", "").strip()
    _local.line = ""
    if not line.strip("."):
        return
    level = getattr(_local, "level", _DEBUG)
    buffers = getattr(_local, "buffers", None)
    if buffers is not None and (told := _BUFFER_SIZE.search(line)):
        buffers.append(Buffer(told.group(1), told.group(2), int(float(told.group(3)) * 2**20)))
    if level == _ERROR:
        errors = getattr(_local, "errors", None)
        if errors is not None:
            errors.append(line[:300])
            del errors[:-3]
        _log.warning("llama.cpp", message=line)
    elif level == _WARN:
        _log.info("llama.cpp", message=line)
    else:
        _log.debug("llama.cpp", message=line)
