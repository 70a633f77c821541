"""Hedging at work: two runners are asked, and the one that brings a token first answers.

The first attempt's Queued and Progress are told as they come, the second one's are not. What either says once in a
stream (Started) is held back until its first token, so that the caller hears of one of them alone. The loser's call is
cancelled before anything of the winner's is passed on.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError

from chorus.api.runner.v1 import runner_pb2
from chorus.coordinator.placing import Placing, Running
from chorus.coordinator.relay import HeldBack
from chorus.core.errors import ChorusError, UnavailableError
from chorus.core.generation import GenerationRequest
from chorus.core.placement import Needs, PromptTrace
from chorus.core.resilience.delivered import Delivered
from chorus.core.resilience.hedging import FirstTokenTimes, HedgeMode, may_be_hedged
from chorus.telemetry.logs import get_logger
from chorus.telemetry.metrics import GenerationMetrics
from chorus.transport.guarding import StreamGuard

Called: TypeAlias = Any  # AbstractAsyncContextManager[tuple[AsyncIterator[bytes], StreamGuard]]
Write: TypeAlias = Callable[[bytes], Awaitable[None]]

_parse = runner_pb2.GenerateResponse.FromString
_log = get_logger()


class Hedging:
    """Whose attempts get a second one beside them, and after how long. `clock` is monotonic seconds."""

    def __init__(
        self, placing: Placing, mode: HedgeMode, *, clock: Callable[[], float], metrics: GenerationMetrics
    ) -> None:
        self.placing = placing
        self.clock = clock
        self._mode = mode
        self._metrics = metrics
        self._times = FirstTokenTimes()

    def may_be(self, request: GenerationRequest, *, allowed: bool) -> bool:
        """Whether a request may be sent to two runners."""
        return may_be_hedged(request, self._mode, allowed=allowed)

    def late_after(self, running: Running, needs: Needs) -> float | None:
        """After how many seconds without a token an attempt is late; None where that isn't known."""
        return self._times.late_after(running.candidate.model.artifact.name, needs.likely_prompt_tokens)

    def took(self, running: Running, needs: Needs, seconds: float) -> None:
        """An attempt brought its first token after so long, or was left then for another one's."""
        self._times.note(running.candidate.model.artifact.name, needs.likely_prompt_tokens, seconds)

    @asynccontextmanager
    async def timed(self, running: Running, delivered: Delivered, needs: Needs) -> AsyncIterator[None]:
        """Measures how long an attempt, which is the block, takes to its first token."""
        began, candidate = self.clock(), running.candidate
        begun = delivered.started
        try:
            yield
        finally:
            # One that was outrun has been measured already, and its winner by when it began.
            if not begun and delivered.first_at is not None and running.candidate is candidate:
                self.took(running, needs, delivered.first_at - began)

    def ended(self, running: Running, outcome: str) -> None:
        """A second attempt was made, and `won`, `lost` or `failed`."""
        self._metrics.hedge(outcome)
        _log.info(
            "attempt.hedged",
            outcome=outcome,
            attempt=running.number,
            runner_id=running.candidate.runner_id,
            model=running.candidate.model.artifact.name,
        )


class Race:
    """One attempt and, where that is late, the second one beside it.

    `called` makes the call of an attempt, `asks` its message; the one that answers is asked for its message last.
    """

    def __init__(
        self,
        hedging: Hedging,
        running: Running,
        called: Callable[[Running, runner_pb2.GenerateRequest], Called],
        asks: Callable[[Running], runner_pb2.GenerateRequest],
        needs: Needs,
        trace: PromptTrace,
    ) -> None:
        self._hedging = hedging
        self._running = running
        self._called = called
        self._asks = asks
        self._needs = needs
        self._trace = trace

    @asynccontextmanager
    async def run(
        self, message: runner_pb2.GenerateRequest, write: Write
    ) -> AsyncIterator[tuple[AsyncIterator[bytes], StreamGuard]]:
        """The messages of whoever is first, from its Started on; the other one has ended. Raises as a call does."""
        first = _Entrant(self._running, self._called(self._running, message), write, self._hedging.clock)
        winner = await self._first_of(first)
        async with winner.stack:
            yield winner.whole(), winner.guard

    async def _first_of(self, first: _Entrant) -> _Entrant:
        """The winner, whose call is open. Whatever happens here, no other call is left open."""
        entrants, winner = [first], None
        tasks = {asyncio.create_task(first.run()): first}
        try:
            late_after_s = self._hedging.late_after(self._running, self._needs)
            if late_after_s is not None:
                done, _ = await asyncio.wait(tasks, timeout=late_after_s)
                second = None if done else self._second(late_after_s)
                if second is not None:
                    entrants.append(second)
                    tasks[asyncio.create_task(second.run())] = second
            winner = await self._decided(tasks, first)
        finally:
            for task in tasks:
                task.cancel()
            try:
                if tasks:
                    await asyncio.wait(tasks)
                await first.told()
            except asyncio.CancelledError:  # the caller goes away, and nobody reads what the winner brings
                winner = None
                raise
            finally:
                for entrant in entrants:
                    if entrant is not winner:  # it may have won in the moment in which the caller went
                        await entrant.stack.aclose()
        return winner

    def _second(self, after_s: float) -> _Entrant | None:
        hedge = self._hedging.placing.hedge(self._running, self._needs, self._trace, after_s=after_s)
        if hedge is None:
            return None
        message = self._asks(hedge)
        self._asks(self._running)  # which is the one that runs, until the other one wins
        return _Entrant(hedge, self._called(hedge, message), None, self._hedging.clock)

    async def _decided(self, tasks: dict[asyncio.Task[None], _Entrant], first: _Entrant) -> _Entrant:
        """Whoever brings a token first, with the books of both put right. Raises the error of the last one."""
        hedging, running = self._hedging, self._running
        hedge: _Entrant | None = next((entrant for entrant in tasks.values() if entrant is not first), None)
        settled = hedge is None
        try:
            while True:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: tasks[task] is not first):
                    entrant = tasks.pop(task)
                    error = task.exception()
                    if error is None:
                        if hedge is not None and not settled:
                            settled = True
                            self._won(entrant, first, hedge)
                        return entrant
                    if not tasks or not isinstance(error, ChorusError):
                        raise error
                    settled = True
                    assert hedge is not None, "there are two"
                    if entrant is first:  # the second one goes on in its place
                        hedging.placing.outrun(running, hedge.running, error)
                        self._asks(running)
                    else:
                        hedging.placing.settle(hedge.running, error)
                        hedging.ended(hedge.running, "failed")
        except BaseException:
            if hedge is not None and not settled:
                hedging.placing.settle(hedge.running, None, tried=False)
            raise

    def _won(self, winner: _Entrant, first: _Entrant, hedge: _Entrant) -> None:
        hedging, now = self._hedging, self._hedging.clock()
        if winner is first:
            hedging.ended(hedge.running, "lost")
            hedging.placing.settle(hedge.running, None, tried=False)
            return
        hedging.ended(hedge.running, "won")
        for entrant in (first, hedge):
            hedging.took(entrant.running, self._needs, now - entrant.began)
        hedging.placing.outrun(self._running, hedge.running)
        self._asks(self._running)


class _Entrant:
    """One of the two, up to its first token. `write` None: nobody is told that it waits."""

    guard: StreamGuard

    def __init__(self, running: Running, called: Called, write: Write | None, clock: Callable[[], float]) -> None:
        self.running = running
        self.stack = AsyncExitStack()
        self.began = clock()
        self._called = called
        self._write = write
        self._clock = clock
        self._call: Any = None
        self._telling: asyncio.Future[None] | None = None
        self._read = HeldBack(running.candidate.runner_id)

    async def run(self) -> None:
        """Returns once a token, or the end of an empty answer, has come. Raises ChorusErrors."""
        try:
            self._call, self.guard = await self.stack.enter_async_context(self._called)
            await self._to_first_token()
        except BaseException:
            # As if it were raised within the call's own block, which says what it means.
            await self.stack.__aexit__(*sys.exc_info())
            raise

    async def told(self) -> None:
        """Returns once nothing of it is on its way to the caller: two messages can't be written at once."""
        if self._telling is not None and not self._telling.done():
            await asyncio.wait({self._telling})

    async def whole(self) -> AsyncIterator[bytes]:
        """What was held back, and all that follows."""
        for raw in self._read.messages:
            yield raw
        async for raw in self._call:
            yield raw

    async def _to_first_token(self) -> None:
        watch = self.guard.watch
        async for raw in self._call:
            kind = _kind(raw)
            watch.heard(self._clock(), tokens=False)
            if kind not in ("queued", "progress"):
                self._read.add(raw)
                if kind not in ("started", "prompt_scored"):
                    return
            elif self._write is not None:
                self._telling = asyncio.ensure_future(self._write(raw))
                await asyncio.shield(self._telling)
            watch.listening(self._clock())
        raise UnavailableError(
            f"the stream of the runner {self.running.candidate.runner_id} ended early, before the answer was complete"
        )


def _kind(raw: bytes) -> str | None:
    """The kind of a message's event; None where it is no message, which the relay will say."""
    try:
        return _parse(raw).event.WhichOneof("event")
    except DecodeError:
        return None
