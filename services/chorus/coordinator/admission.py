"""Requests at the door of a coordinator: they hold a place while they run, or wait for their turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from chorus.core.admission import RETRY_MIN_S, AdmissionQueue, Capacity, Ticket
from chorus.core.errors import DeadlineExceededError, OverloadedError
from chorus.core.generation import Priority

Tell = Callable[[int, float], Awaitable[None]]
"""Is told how many requests come before one that has to wait, and about how many seconds it will wait."""


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks for what: `lane` as placement names it, `most_tokens` that the answer may have (0: untold)."""

    caller: str
    priority: Priority = Priority.INTERACTIVE
    lane: str = ""
    most_tokens: int = 0
    time_left_s: float | None = None


@dataclass(slots=True)
class Place:
    """A request's place while it runs; `tokens` is how many it has generated."""

    ticket: Ticket
    tokens: int = 0


class Admission:
    """An AdmissionQueue with a clock and waiters. Used from one event loop; `clock` is monotonic seconds."""

    def __init__(self, capacity: Capacity, *, limit: int, max_queued: int, clock: Callable[[], float]) -> None:
        self._queue = AdmissionQueue(capacity, limit=limit, max_queued=max_queued)
        self._clock = clock
        self._futures: dict[int, asyncio.Future[None]] = {}

    @property
    def running(self) -> int:
        """Requests under way."""
        return self._queue.running

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._queue.waiting

    def waiting_of_lanes(self) -> Mapping[str, int]:
        """Requests that wait for their turn, by lane."""
        return self._queue.waiting_of_lanes()

    @asynccontextmanager
    async def admitted(self, asking: Asking, tell: Tell | None = None) -> AsyncIterator[Place]:
        """Holds a place, once there is one; only a block that is left without an error tells how long one takes.

        Raises as `enter`.
        """
        place = await self.enter(asking, tell)
        well = False
        try:
            yield place
            well = True
        finally:
            self.leave(place, well=well)

    async def enter(self, asking: Asking, tell: Tell | None = None, *, wait: bool = True) -> Place:
        """Takes a place, once there is one; `leave` must follow. Without `wait` there must be one now.

        Raises OverloadedError where the request is not taken on, and DeadlineExceededError where its time ran out.
        """
        now = self._clock()
        deadline = None if asking.time_left_s is None else now + asking.time_left_s
        who = (asking.caller, asking.priority, asking.lane, now)
        ticket = self._queue.take(*who, most_tokens=asking.most_tokens, deadline=deadline)
        if ticket is None and not wait:  # nobody need make way for who doesn't stay
            wait_s = self._queue.wait_seconds(asking.priority, asking.lane)
            raise OverloadedError(
                f"there is no place now, but in some {wait_s:.1f} s; Generate waits, and Place does with `wait`",
                retry_after_s=max(wait_s, RETRY_MIN_S),
            )
        if ticket is None:
            ticket = self._queue.offer(*who, most_tokens=asking.most_tokens, deadline=deadline)
            await self._turn_of(ticket, asking, tell)
        return Place(ticket)

    def leave(self, place: Place, *, well: bool) -> None:
        """Gives a place back; only who ended `well` tells how long one takes."""
        self._queue.ended(place.ticket, self._clock(), tokens=place.tokens, well=well)
        if self._queue.waiting:
            self.turn()

    def turn(self) -> None:
        """Lets everybody go whose turn it is. Call it whenever the mesh has changed."""
        again = True
        while again:
            again = False
            now = self._clock()
            turn = self._queue.turn(now)
            for ticket, error in turn.refused:
                future = self._futures.pop(ticket.number)
                if not future.done():
                    future.set_exception(error)
            for ticket in turn.admitted:
                future = self._futures.pop(ticket.number)
                if future.done():  # its caller has just gone away
                    self._queue.ended(ticket, now, well=False)
                    again = True
                else:
                    future.set_result(None)

    async def _turn_of(self, ticket: Ticket, asking: Asking, tell: Tell | None) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures[ticket.number] = future
        self.turn()
        try:
            async with asyncio.timeout(None if future.done() else asking.time_left_s):
                if tell is not None and not future.done():
                    wait_s = self._queue.wait_seconds(asking.priority, asking.lane)
                    await tell(self._queue.position(ticket), wait_s)
                await future
        except BaseException as error:
            self._give_up(ticket, future)
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError("the request's deadline passed while it waited for its turn") from None
            raise

    def _give_up(self, ticket: Ticket, future: asyncio.Future[None]) -> None:
        """The caller is not there any more, whether or not its turn had come."""
        self._futures.pop(ticket.number, None)
        if future.done() and not future.cancelled() and future.exception() is None:
            self._queue.ended(ticket, self._clock(), well=False)
        else:
            self._queue.withdraw(ticket)
        self.turn()
