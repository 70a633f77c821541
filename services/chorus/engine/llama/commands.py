"""What the event loop asks of an owner thread, and how the thread answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chorus.core.errors import ChorusError
from chorus.engine.llama.job import Job


@dataclass(frozen=True, slots=True)
class Submit:
    """Start a request."""

    job: Job


@dataclass(frozen=True, slots=True)
class Cancel:
    """Its reader went away."""

    job: Job


@dataclass(frozen=True, slots=True)
class Embed:
    """Make the vector of one text; the result is a list of floats."""

    token_ids: list[int]
    normalize: bool
    result: asyncio.Future[list[float]]


@dataclass(frozen=True, slots=True)
class ForgetCache:
    """Drop every finished sequence from memory."""

    result: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class Stop:
    """End everything."""


Command = Submit | Cancel | Embed | ForgetCache | Stop


class Outbox:
    """What a thread has to say to the event loop, gathered so that a whole step goes over in one call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Used by one thread; the calls that are posted run on `loop`."""
        self._loop = loop
        self._calls: list[tuple[Callable[[Any], None], Any]] = []

    def __bool__(self) -> bool:
        return bool(self._calls)

    def post(self, call: Callable[[Any], None], value: Any) -> None:
        """Lets the event loop call `call(value)`, in order with the others."""
        self._calls.append((call, value))

    def settle(self, future: asyncio.Future[list[float]], value: list[float] | ChorusError) -> None:
        """Gives a future its result or error, unless its reader went away."""

        def settle(value: list[float] | ChorusError) -> None:
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
        calls, self._calls = self._calls, []
        try:
            self._loop.call_soon_threadsafe(_deliver, calls)
        except RuntimeError:
            return False
        return True


def _deliver(calls: list[tuple[Callable[[Any], None], Any]]) -> None:
    for call, value in calls:
        call(value)
