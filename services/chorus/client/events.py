"""What happens in the mesh, from every coordinator at once: each sees the requests that it serves itself.

A stream that breaks is begun anew after the last event that was read of it, so nothing comes twice; what could not be
had meanwhile is told as missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.client.coordinators import Coordinators
from chorus.core.errors import DrainingError, UnavailableError
from chorus.core.events import Batch, Cursor, Event, EventFilter, Lost, LostReason, Told
from chorus.wire.mesh_events import decode_told, encode_cursor, encode_event_filter
from chorus.wire.resources import encode_duration

SILENCE_S = 3.0
"""A coordinator says something every second; a stream that is silent for this long is broken."""

_BACKOFF_S = (0.1, 0.2, 0.5, 1.0)
# What was read and not taken yet, of all coordinators: a slow reader is one to the coordinators as well.
_READ_AHEAD = 16


@dataclass(frozen=True, slots=True)
class SeenEvent:
    """An event, and the coordinator that saw it."""

    coordinator: str
    event: Event


@dataclass(frozen=True, slots=True)
class EventsMissing:
    """Events of a coordinator are missing here: `count`, or 0 where nobody can know."""

    coordinator: str
    reason: LostReason
    count: int


@dataclass(frozen=True, slots=True)
class CoordinatorLost:
    """A coordinator can't be watched now; it is tried again until it can."""

    coordinator: str
    why: str


@dataclass(frozen=True, slots=True)
class CoordinatorWatched:
    """A coordinator is watched from here on, for the first time or again."""

    coordinator: str


EventNews: TypeAlias = SeenEvent | EventsMissing | CoordinatorLost | CoordinatorWatched


async def watch_all(
    coordinators: Sequence[tuple[str, Coordinators]], condition: EventFilter, since_s: float | None
) -> AsyncGenerator[EventNews]:
    """The news of every coordinator, each given with its name, for ever. Raises what trying again would not help."""
    news: asyncio.Queue[EventNews] = asyncio.Queue(_READ_AHEAD)
    watches = [_Watch(name, asked, condition, since_s, news) for name, asked in coordinators]
    tasks = [asyncio.create_task(watch.run()) for watch in watches]
    try:
        while True:
            taking = asyncio.ensure_future(news.get())
            try:
                await asyncio.wait({taking, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not taking.done():
                    taking.cancel()
            if taking.done() and not taking.cancelled():
                yield taking.result()
                continue
            for task in tasks:
                if task.done():
                    task.result()  # raises
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Watch:
    """The watch of one coordinator."""

    def __init__(
        self,
        name: str,
        asked: Coordinators,
        condition: EventFilter,
        since_s: float | None,
        news: asyncio.Queue[EventNews],
    ) -> None:
        self._name = name
        self._asked = asked
        self._filter = encode_event_filter(condition)
        self._since_s = since_s
        self._news = news
        self._cursor: Cursor | None = None
        self._watched = False
        self._problem = ""

    async def run(self) -> None:
        failures = 0
        while True:
            try:
                await self._watch_once()
                problem = "it ended the watch"
            except TimeoutError:
                problem = f"it said nothing for {SILENCE_S:g} s"
            except (UnavailableError, DrainingError) as error:
                problem = error.message
            failures = 0 if self._watched else failures + 1
            if self._watched or problem != self._problem:
                await self._news.put(CoordinatorLost(self._name, problem))
            self._watched, self._problem = False, problem
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])

    async def _watch_once(self) -> None:
        request = pb.WatchEventsRequest(filter=self._filter)
        if self._cursor is not None:
            request.after.CopyFrom(encode_cursor(self._cursor))
        elif self._since_s is not None:
            request.since.CopyFrom(encode_duration(self._since_s))
        async with aclosing(self._asked.stream("WatchEvents", request)) as messages:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    message = await anext(messages, None)
                if message is None:
                    return
                told = decode_told(message.events)
                if not self._watched:
                    self._watched, self._problem = True, ""
                    await self._news.put(CoordinatorWatched(self._name))
                await self._pass_on(told)

    async def _pass_on(self, told: Told) -> None:
        if isinstance(told, Lost):
            await self._news.put(EventsMissing(self._name, told.reason, told.count))
        elif isinstance(told, Batch):
            for event in told.events:
                await self._news.put(SeenEvent(self._name, event))
        # Not before: a break in the middle of a batch would lose the rest of it.
        self._cursor = told.cursor
