"""Logs: one line for each event, for people or as JSON, each with the request that it belongs to.

An event's name is dotted and in lower case (`lease.expired`); what varies goes into fields. The libraries that log
through `logging` (grpc, httpx, huggingface_hub) come out in the same lines, as `library.log`. An event of a level that
is not logged costs next to nothing on a bound logger: a loop binds its own, once, before it starts.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Literal, Self, TextIO, cast

import structlog
from structlog.processors import ExceptionRenderer, format_exc_info
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from chorus.core.errors import ChorusError, ConfigError
from chorus.telemetry.context import current
from chorus.telemetry.redaction import redact, without_keys

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "console", "json"]

_LEVELS = MappingProxyType({name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error")})
# At INFO these tell of every request, at DEBUG of every byte.
_TALKATIVE = ("httpx", "httpcore", "huggingface_hub", "urllib3", "filelock", "asyncio", "hpack")
_MAX_FRAMES = 30


class _UnlessConfigured:
    """A logger that goes by what is configured at the time of an event. Where nothing is, this is a library in somebody
    else's program, which hears warnings on standard error and nothing on standard output."""

    def __init__(self, fields: dict[str, object]) -> None:
        self._fields = fields

    def __getattr__(self, name: str) -> object:
        if structlog.is_configured():
            return getattr(structlog.get_logger(**self._fields), name)  # noqa: TID251 - here alone
        quiet = structlog.wrap_logger(
            structlog.PrintLogger(sys.stderr),
            processors=[structlog.processors.add_log_level, structlog.dev.ConsoleRenderer(colors=False)],
            wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        )
        return getattr(quiet.bind(**self._fields), name)


def get_logger(**fields: object) -> FilteringBoundLogger:
    """Returns a logger that adds `fields` to its events. It may be made before logging is configured; a process that
    never does so prints warnings and errors alone, on standard error."""
    return cast(FilteringBoundLogger, _UnlessConfigured(fields))


class LoggingHandle:
    """What `configure_logging` set up. Closing it, or leaving its `with` block, undoes that and closes the log file."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def close(self) -> None:
        """Undoes the configuration; a second time does nothing."""
        undo, self._undo = self._undo, lambda: None
        undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def configure_logging(
    *,
    service: str,
    level: Level = "info",
    format: Format = "auto",
    prompts: bool = False,
    file: Path | None = None,
    stream: TextIO | None = None,
) -> LoggingHandle:
    """Sets up logging for this process, once and at its start: `configure_logging(service=..., **dict(config.log))`.

    Events go to `file`, else to `stream`, else to what standard error is at the time of the event. Raises ConfigError
    where the file cannot be written.
    """
    opened = _open(file) if file is not None else None
    before = structlog.get_config() if structlog.is_configured() else None
    lines = _Lines(opened or stream)
    people = format == "console" or (format == "auto" and lines.is_terminal())
    exceptions = format_exc_info if people else ExceptionRenderer(_traceback_fields)
    render = (
        _console(colors=lines.is_terminal() and not os.environ.get("NO_COLOR")) if people else _json(lines.encoding())
    )
    structlog.configure(
        processors=[_stamp(service, brief=people), exceptions, _redaction(prompts), render],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: lines,
        # A cached logger would keep this configuration for ever, and every module has one; `bind()` is as fast.
        cache_logger_on_first_use=False,
    )
    restore = _route_stdlib(_LEVELS[level])

    def undo() -> None:
        restore()
        if before is None:
            structlog.reset_defaults()
        else:
            structlog.configure(**before)
        lines.detach()
        if opened is not None:
            opened.close()

    return LoggingHandle(undo)


# --- what happens to an event ---------------------------------------------------------------------------------------


def _stamp(service: str, *, brief: bool) -> Processor:
    """Puts first what every line has: when, how severe, who, what, and for which request."""

    def stamp(_logger: object, method: str, event: EventDict) -> EventDict:
        line: EventDict = {
            "timestamp": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": "error" if method == "exception" else method,
            "service": service,
            "event": event.pop("event", ""),
        }
        context = current()
        if context is not None:
            line["request_id"] = context.request_id
            if not brief:
                line["trace_id"] = context.trace_id
                line["span_id"] = context.span_id
        error = event.get("exc_info")
        if error is True:
            error = sys.exc_info()[1]
        if isinstance(error, ChorusError):
            line["reason"] = error.reason
        line.update(event)
        return line

    return stamp


def _redaction(prompts: bool) -> Processor:
    def hide(_logger: object, _method: str, event: EventDict) -> EventDict:
        redact(event, prompts=prompts)
        for name in ("message", "exception"):  # the two that hold free text written by others
            if name in event:
                event[name] = without_keys(event[name])
        return event

    return hide


_traceback_fields = ExceptionDictTransformer(show_locals=False, max_frames=_MAX_FRAMES, use_rich=False)
"""Locals stay out of tracebacks: prompts and keys are among them."""


def _json(encoding: str | None) -> Processor:
    unicode = encoding is None or encoding.lower().startswith("utf")

    def render(_logger: object, _method: str, event: EventDict) -> str:
        try:
            line = json.dumps(event, ensure_ascii=not unicode, allow_nan=False, separators=(",", ":"))
        except ValueError:  # JSON has no NaN and no infinity
            line = json.dumps(_finite(event), ensure_ascii=not unicode, separators=(",", ":"))
        if line.isprintable():
            return line
        # Line separators and terminal controls beyond ASCII, and halves of a surrogate pair, which JSON lets stand.
        return "".join(mark if mark.isprintable() else json.dumps(mark)[1:-1] for mark in line)

    return render


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _console(*, colors: bool) -> Processor:
    renderer = structlog.dev.ConsoleRenderer(
        colors=colors, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
    )

    def render(logger: object, method: str, event: EventDict) -> str:
        for name, value in event.items():
            if isinstance(value, str) and not value.isprintable():
                event[name] = _harmless(value, keep="\n\t" if name == "exception" else "")
        return str(renderer(logger, method, event))

    return render


def _harmless(text: str, *, keep: str) -> str:
    """Escapes what would steer a terminal: some of a log was sent by peers."""
    return "".join(mark if mark.isprintable() or mark in keep else repr(mark)[1:-1] for mark in text)


# --- where lines go -------------------------------------------------------------------------------------------------


class _Lines:
    """Writes whole lines, from any thread. A stream that is gone loses the line and never stops who logged it."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def is_terminal(self) -> bool:
        return (self._stream or sys.stderr).isatty()

    def encoding(self) -> str | None:
        return (self._stream or sys.stderr).encoding

    def detach(self) -> None:
        """From now on standard error: loggers that were bound before keep this object for good."""
        self._stream = None

    def msg(self, line: str) -> None:
        with self._lock, suppress(OSError, ValueError):
            stream = self._stream or sys.stderr
            try:
                stream.write(line + "\n")
            except UnicodeEncodeError:
                encoding = stream.encoding or "ascii"
                stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            stream.flush()

    debug = info = warning = error = critical = exception = log = msg


def _open(file: Path) -> TextIO:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Private from the start: with log.prompts on, it holds what people wrote.
        return open(file, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600))
    except OSError as error:
        raise ConfigError(
            f"log.file = '{file}': cannot be written: {error.strerror or error}", metadata={"keys": "log.file"}
        ) from error


class _FromStdlib(logging.Handler):
    """Hands what libraries log through `logging` to structlog."""

    def __init__(self) -> None:
        super().__init__()
        self._log = get_logger()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # a library's mistake in its own format must not become ours
            message = str(record.msg)
        severity = max(logging.DEBUG, min(logging.CRITICAL, record.levelno // 10 * 10))
        fields = {"exc_info": record.exc_info} if record.exc_info and record.exc_info[0] is not None else {}
        self._log.log(severity, "library.log", library=record.name, message=message, **fields)


def _route_stdlib(threshold: int) -> Callable[[], None]:
    """Makes `logging` write through structlog; returns what undoes that."""
    root = logging.getLogger()
    before = {logger: logger.level for logger in (root, *map(logging.getLogger, _TALKATIVE))}
    for handler in [handler for handler in root.handlers if isinstance(handler, _FromStdlib)]:
        root.removeHandler(handler)
    bridge = _FromStdlib()
    root.addHandler(bridge)
    root.setLevel(threshold)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(
            max(threshold, logging.INFO if threshold == logging.DEBUG else logging.WARNING)
        )

    def restore() -> None:
        root.removeHandler(bridge)
        for logger, level in before.items():
            logger.setLevel(level)

    return restore
