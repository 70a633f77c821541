"""What follows a request over every hop: its request id and its W3C trace context.

A server calls `accept()` on the metadata it was sent, `bind()`s the result for as long as it handles the call, and
adds `outgoing_metadata()` to every call that it makes meanwhile. A process that starts a request itself (the command
line, the Python client) binds `new_context()` instead. Nothing here fails: what is malformed is replaced, because a bad
header must not cost anybody an answer.

https://www.w3.org/TR/trace-context-2/ says what `traceparent` and `tracestate` look like.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass

REQUEST_ID_KEY = "x-request-id"
TRACEPARENT_KEY = "traceparent"
TRACESTATE_KEY = "tracestate"

SAMPLED = 0x01  # the caller recorded this trace
RANDOM_TRACE_ID = 0x02  # the last seven bytes of the trace id, at least, are random
_KNOWN_FLAGS = SAMPLED | RANDOM_TRACE_ID  # other bits are reserved; they must be zero when sent

RandomHex = Callable[[int], str]
"""Returns that many random bytes as lower-case hexadecimal digits, as `secrets.token_hex` does."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Version 00 ends after the flags; a later version may go on after another dash, with what we do not know.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)

_TRACESTATE_MAX_MEMBERS = 32
_TRACESTATE_MAX_LENGTH = 512
_TRACESTATE_MEMBER = re.compile(
    r"(?P<key>[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
    r"=(?P<value>[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e])"
)


@dataclass(frozen=True, slots=True)
class TraceParent:
    """What a `traceparent` header says: the trace, the caller's span within it, and the flags that we know."""

    trace_id: str  # 32 lower-case hexadecimal digits, not all zero
    parent_id: str  # 16 of them, not all zero
    flags: int

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.parent_id}-{self.flags & _KNOWN_FLAGS:02x}"


@dataclass(frozen=True, slots=True)
class RequestContext:
    """One hop of one request. `span_id` is this hop's own; `parent_span_id` is the caller's, or empty at the origin."""

    request_id: str
    trace_id: str
    span_id: str
    parent_span_id: str = ""
    trace_flags: int = 0
    tracestate: str = ""

    @property
    def traceparent(self) -> str:
        """The header for calls made while handling this hop: their parent is this hop's span."""
        return str(TraceParent(self.trace_id, self.span_id, self.trace_flags))

    @property
    def sampled(self) -> bool:
        """Whether the origin asked for this trace to be recorded."""
        return bool(self.trace_flags & SAMPLED)


_current: ContextVar[RequestContext | None] = ContextVar("chorus_request_context", default=None)


def parse_traceparent(value: str) -> TraceParent | None:
    """Returns what `value` says, or None where the standard tells us to start a new trace instead.

    A version later than 00 is read for the fields that 00 has, and answered as 00.
    """
    match = _TRACEPARENT.fullmatch(value)
    if match is None:
        return None
    version, trace_id, parent_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return None
    if not trace_id.strip("0") or not parent_id.strip("0"):
        return None
    return TraceParent(trace_id, parent_id, int(flags, 16) & _KNOWN_FLAGS)


def parse_tracestate(values: Iterable[str]) -> str:
    """Returns the `tracestate` headers joined into one of at most 512 characters, or "" where any of it is malformed.

    Too long a one is shortened as the standard says: members over 128 characters go first, then those at the end.
    """
    members: list[str] = []
    keys: set[str] = set()
    for raw in ",".join(values).split(","):
        member = raw.strip(" \t")
        if not member:
            continue
        match = _TRACESTATE_MEMBER.fullmatch(member)
        if match is None or match["key"] in keys or len(members) == _TRACESTATE_MAX_MEMBERS:
            return ""
        keys.add(match["key"])
        members.append(member)
    excess = sum(len(member) + 1 for member in members) - 1 - _TRACESTATE_MAX_LENGTH
    for position in sorted(range(len(members)), key=lambda at: (len(members[at]) > 128, at), reverse=True):
        if excess <= 0:
            break
        excess -= len(members[position]) + 1
        members[position] = ""
    return ",".join(member for member in members if member)


def is_request_id(value: str) -> bool:
    """Whether `value` may be a request id: 1 to 128 letters, digits, dots, underscores and dashes of ASCII."""
    return _REQUEST_ID.fullmatch(value) is not None


def new_context(
    request_id: str | None = None, *, sampled: bool = False, random_hex: RandomHex = secrets.token_hex
) -> RequestContext:
    """Returns the context of a request that starts here, under `request_id` if it is given and well-formed."""
    return RequestContext(
        request_id=request_id if request_id is not None and is_request_id(request_id) else random_hex(16),
        trace_id=random_hex(16),
        span_id=random_hex(8),
        trace_flags=RANDOM_TRACE_ID | (SAMPLED if sampled else 0),
    )


def accept(metadata: Iterable[tuple[str, str | bytes]], *, random_hex: RandomHex = secrets.token_hex) -> RequestContext:
    """Returns the context of a call that arrived with `metadata`: the caller's ids, and a span id of our own.

    A missing or malformed request id, or trace, is replaced by a new one. The first of several request ids counts;
    several `traceparent`s are no trace.
    """
    request_id: str | None = None
    parents: list[str] = []
    states: list[str] = []
    for key, value in metadata:
        name = key.lower()
        if name not in (REQUEST_ID_KEY, TRACEPARENT_KEY, TRACESTATE_KEY):
            continue
        text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
        if name == REQUEST_ID_KEY:
            request_id = request_id if request_id is not None else text
        elif name == TRACEPARENT_KEY:
            parents.append(text)
        else:
            states.append(text)
    parent = parse_traceparent(parents[0]) if len(parents) == 1 else None
    if parent is None:
        return new_context(request_id, random_hex=random_hex)
    return RequestContext(
        request_id=request_id if request_id is not None and is_request_id(request_id) else random_hex(16),
        trace_id=parent.trace_id,
        span_id=random_hex(8),
        parent_span_id=parent.parent_id,
        trace_flags=parent.flags,
        tracestate=parse_tracestate(states),
    )


def current() -> RequestContext | None:
    """Returns the context bound in this task or thread, or None outside any request."""
    return _current.get()


def bind(context: RequestContext) -> Token[RequestContext | None]:
    """Makes `context` the current one of this task or thread; give the token to `reset()` when the call ends."""
    return _current.set(context)


def reset(token: Token[RequestContext | None]) -> None:
    """Undoes the `bind()` that returned `token`, in the same task or thread."""
    _current.reset(token)


@contextmanager
def bound(context: RequestContext) -> Iterator[RequestContext]:
    """Binds `context` for the length of a `with` block."""
    token = bind(context)
    try:
        yield context
    finally:
        reset(token)


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """Returns what to add to a call made now: the current request's id and trace, or nothing outside any request."""
    context = _current.get()
    if context is None:
        return ()
    pairs = ((REQUEST_ID_KEY, context.request_id), (TRACEPARENT_KEY, context.traceparent))
    return (*pairs, (TRACESTATE_KEY, context.tracestate)) if context.tracestate else pairs
