"""What the event loop asks of an owner thread, and how the thread answers."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from chorus.core.errors import ChorusError
from chorus.core.generation import Priority
from chorus.engine.llama.binding import Adapter
from chorus.engine.llama.job import Job

T = TypeVar("T")
Vector: TypeAlias = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Submit:
    """Start a request."""

    job: Job


@dataclass(frozen=True, slots=True)
class Cancel:
    """Its reader went away."""

    job: Job


@dataclass(frozen=True, slots=True, eq=False)
class Embed:
    """Make the vector of each text, given as token ids; the result has them in order."""

    texts: list[list[int]]
    normalize: bool
    priority: Priority
    result: asyncio.Future[list[Vector]]


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Nobody waits for these vectors any more."""

    request: Embed


@dataclass(frozen=True, slots=True)
class ForgetCache:
    """Drop every finished sequence from memory."""

    result: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class ReleaseAdapter:
    """Free an adapter that no request uses."""

    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Stop:
    """End everything."""


Command = Submit | Cancel | Embed | Withdraw | ForgetCache | ReleaseAdapter | Stop


class Outbox:
    """What a thread has to say to the event loop, gathered so that a whole step goes over in one call.

    The loop is woken without letting go of the interpreter lock, which a write to a socket would do: the loop would
    take it, and the thread could not begin its next decode before the loop has told everybody. So both go on at once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Made on `loop`, then used by one thread; the calls that are posted run on `loop`."""
        self._loop = loop
        self._calls: list[tuple[Callable[[Any], None], Any]] = []
        self._mail: deque[list[tuple[Callable[[Any], None], Any]]] = deque()
        self._bell = -1
        if _ring is not None:
            self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            loop.add_reader(self._bell, self._deliver)

    def __bool__(self) -> bool:
        return bool(self._calls)

    def post(self, call: Callable[[Any], None], value: Any) -> None:
        """Lets the event loop call `call(value)`, in order with the others."""
        self._calls.append((call, value))

    def settle(self, future: asyncio.Future[T], value: T | ChorusError) -> None:
        """Gives a future its result or error, unless its reader went away."""

        def settle(value: T | ChorusError) -> None:
            if future.done():
                return
            if isinstance(value, ChorusError):
                future.set_exception(value)
            else:
                future.set_result(value)

        self.post(settle, value)

    def hand_over(self) -> bool:
        """Hands everything over; False where the event loop is closed and nobody listens any more."""
        if not self._calls:
            return True
        self._mail.append(self._calls)
        self._calls = []
        if self._loop.is_closed():
            return False
        if _ring is not None:
            _ring(self._bell, 1)
            return True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        """Nothing more will come. On the event loop, after the last call."""
        if self._bell >= 0:
            self._loop.remove_reader(self._bell)
            os.close(self._bell)
            self._bell = -1

    def _deliver(self) -> None:
        if self._bell >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)
        while self._mail:
            for call, value in self._mail.popleft():
                call(value)


def _find_ring() -> Callable[[int, int], int] | None:
    """C's `eventfd_write`, called with the interpreter lock held; None where there is none (it is Linux's own)."""
    if not hasattr(os, "eventfd"):
        return None
    try:
        ring: Callable[[int, int], int] = ctypes.PyDLL(None).eventfd_write
    except (OSError, AttributeError):
        return None
    ring.argtypes = [ctypes.c_int, ctypes.c_uint64]  # type: ignore[attr-defined]
    return ring


_ring = _find_ring()
