"""One generation at one coordinator after another, until its answer is whole.

What is delivered is kept in `carrying.py`. When a coordinator is lost (its process killed, frozen, cut off, or told to
stop), another one is asked to go on; where there is none, the same one is waited for, as `core/resilience/resuming.py`
says. The mesh's own answer, an error of the request or of every runner, is passed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from chorus.client.carrying import Carrying
from chorus.client.channel import CoordinatorChannel
from chorus.client.coordinators import UNREACHED, Coordinators, Metadata, lost, nobody, too_late
from chorus.client.direct import Direct, Placed, Relayed
from chorus.core.errors import (
    ChorusError,
    EngineError,
    NoCapableRunnerError,
    OverloadedError,
    RunnersUnavailableError,
    TicketError,
    UnavailableError,
    UnknownModelError,
)
from chorus.core.resilience.resuming import Hold, ResumePolicy, Resuming
from chorus.core.resilience.retries import GiveUp, RetryBudget, may_go_better_elsewhere

POLICY = ResumePolicy(fruitless=5)
_END_TIMEOUT_S = 1.0
# What a coordinator may say that was started a moment ago and knows few runners yet, or is full; half an answer is
# worth asking again.
_NOT_NOW = (RunnersUnavailableError, NoCapableRunnerError, UnknownModelError, OverloadedError)


class Generating:
    """One generation. `given_s` is its time in seconds; the metadata are those of all its attempts.

    Its events are what `carrying` reads out of messages: ClientEvents, of an ensemble EnsembleEvents.
    """

    def __init__(
        self,
        coordinators: Coordinators,
        carrying: Carrying,
        budget: RetryBudget,
        *,
        direct: Direct,
        given_s: float,
        metadata: Metadata,
    ) -> None:
        self._coordinators = coordinators
        self._carrying = carrying
        self._direct = direct
        self._resuming = Resuming(POLICY, budget)
        self._broken = False
        self._given_s = given_s
        self._deadline = coordinators.now + given_s
        self._metadata = metadata
        # Those that did not take it: not reached before anybody had it, or not now that it goes on.
        self._passed: dict[int, ChorusError] = {}
        self._nobody_since: float | None = None  # when all of them had been asked in vain before anybody took it
        self._failed: set[int] = set()
        self._preferred: CoordinatorChannel | None = None

    async def events(self) -> AsyncGenerator[Any]:
        """The events of the answer. Raises ChorusErrors."""
        if self._direct.is_next() and not self._carrying.relayed:
            async with aclosing(self._directly()) as events:
                async for event in events:
                    yield event
            if self._carrying.finished:
                return
        while True:
            coordinator = await self._next()
            before = self._carrying.delivered.output_tokens
            try:
                async with aclosing(self._attempt(coordinator)) as events:
                    async for event in events:
                        yield event
                return
            except ChorusError as error:
                self._judge(error, coordinator, brought=self._carrying.delivered.output_tokens > before)

    async def _attempt(self, coordinator: CoordinatorChannel) -> AsyncGenerator[Any]:
        request = self._carrying.attempt(str(coordinator.endpoint))
        messages = self._coordinators.messages(
            coordinator,
            "Generate",
            request,
            timeout_s=self._left_s(),
            metadata=self._metadata,
            given_s=self._given_s,
        )
        async with aclosing(self._read(messages, coordinator.called)) as events:
            async for event in events:
                yield event

    async def _read(self, messages: AsyncGenerator[Any], called: str) -> AsyncGenerator[Any]:
        """The events of an attempt's messages, to the end of the answer. Raises UnavailableError where that misses."""
        carrying = self._carrying
        async with aclosing(messages):
            async for message in messages:
                events = carrying.read(message)
                if carrying.finished:
                    # To its very end, or the other side would see a call that was cancelled.
                    await _read_to_end(messages)
                for event in events:
                    yield event
                if carrying.finished:
                    return
        raise UnavailableError(f"the stream of {called} ended early, before the answer was complete")

    # --- direct mode ------------------------------------------------------------------------------------------------

    async def _directly(self) -> AsyncGenerator[Any]:
        """The events of the first attempt, from the runner itself; where it ends early, the relay is to go on."""
        carrying, direct = self._carrying, self._direct
        message = carrying.attempt("")
        placed = await direct.place(message, metadata=self._metadata, left_s=self._left_s())
        if isinstance(placed, Relayed):
            self._relay_by(placed.coordinator, placed.ticket_id)
            return
        if placed.substitution is not None:
            carrying.substituted(placed.substitution)
        messages = direct.messages(
            placed, carrying, metadata=self._metadata, timeout_s=self._left_s(), given_s=self._given_s
        )
        try:
            async with aclosing(self._read(messages, placed.channel.called)) as events:
                async for event in events:
                    yield event
        except ChorusError as error:
            self._judge_runner(error, placed)

    def _judge_runner(self, error: ChorusError, placed: Placed) -> None:
        """Returns where the relay may do better, else raises what the caller is told."""
        carrying = self._carrying
        if isinstance(error, TicketError):
            self._direct.refused(error)
        elif not may_go_better_elsewhere(error) or carrying.obstacle:
            raise self._final(error)
        if carrying.begun:
            self._broken = True
            ended = self._resuming.broken(
                error,
                placed.channel.runner_id,
                delivered=carrying.delivered.output_tokens,
                obstacle="",
                now=self._coordinators.now,
            )
            if ended is not None:
                raise ended.error from error
        if not isinstance(error, TicketError):
            carrying.failed_at(placed.channel.runner_id)
        carrying.broken(error.reason)
        self._relay_by(placed.coordinator, placed.ticket_id)

    def _relay_by(self, coordinator: CoordinatorChannel | None, ticket_id: str) -> None:
        self._preferred = coordinator
        if ticket_id:
            self._carrying.return_ticket(ticket_id)

    # --- who is next ------------------------------------------------------------------------------------------------

    async def _next(self) -> CoordinatorChannel:
        """Who is asked next; waits for somebody once the generation has broken off. Raises what it ends with."""
        preferred, self._preferred = self._preferred, None
        if preferred is not None and not self._broken:
            return preferred
        while not self._broken:
            coordinator = self._coordinators.choose(self._passed)
            if coordinator is not None:
                return coordinator
            if self._nobody_since is None:
                self._nobody_since = self._coordinators.now
            if not await self._coordinators.wait(self._nobody_since):
                raise nobody(self._passed.values())
            self._passed.clear()
        while True:
            step = self._resuming.look(self._coordinators.now)
            if isinstance(step, GiveUp):
                raise step.error
            if not isinstance(step, Hold):
                without = self._passed.keys() | (set() if step.anybody else self._failed)
                coordinator = self._coordinators.choose(without)
                if coordinator is not None:
                    return coordinator
            pauses = [step.seconds, *(error.retry_after_s or 0.0 for error in self._passed.values())]
            self._passed.clear()
            await asyncio.sleep(min(max(pauses), POLICY.wait_s, self._left_s()))

    def _judge(self, error: ChorusError, coordinator: CoordinatorChannel, *, brought: bool) -> None:
        """Returns where somebody else may do better, else raises what the caller is told."""
        carrying, place = self._carrying, coordinator.place
        if lost(error) and UNREACHED in error.metadata and not brought:
            return self._pass(place, error)
        if self._broken and not brought and isinstance(error, _NOT_NOW):
            return self._pass(place, error)
        if not lost(error):
            may_go_on = carrying.begun and isinstance(error, UnavailableError | EngineError)
            if not may_go_on or carrying.obstacle:
                raise self._final(error)
        if brought or not self._broken:
            self._failed.clear()
        self._failed.add(place)
        self._passed.clear()
        if not lost(error) and self._coordinators.choose(self._failed) is None:
            raise self._final(error)  # each of them has said so
        self._broken = True
        ended = self._resuming.broken(
            _breaks(error),
            str(coordinator.endpoint),
            delivered=carrying.delivered.output_tokens,
            obstacle=carrying.obstacle,
            now=self._coordinators.now,
        )
        if ended is not None:
            raise ended.error from error
        return carrying.broken(error.reason)

    def _final(self, error: ChorusError) -> ChorusError:
        """The error with how much the caller has got, where that is any."""
        if self._carrying.begun:
            error.metadata = {**error.metadata, "delivered_tokens": str(self._carrying.delivered.output_tokens)}
        return error

    def _pass(self, place: int, error: ChorusError) -> None:
        self._passed[place] = error
        if self._broken:
            self._resuming.refused(error)

    def _left_s(self) -> float:
        left_s = self._deadline - self._coordinators.now
        if left_s <= 0:
            raise too_late(self._given_s)
        return left_s


def _breaks(error: ChorusError) -> ChorusError:
    """As what breaks a stream off, whatever else it is: a coordinator that stops has not refused the request."""
    return (
        error
        if isinstance(error, UnavailableError | EngineError)
        else UnavailableError(error.message, metadata=error.metadata)
    )


async def _read_to_end(messages: AsyncGenerator[object]) -> None:
    """Reads what comes after the answer, which is nothing; how the stream ends matters no more."""
    try:
        async with asyncio.timeout(_END_TIMEOUT_S):
            async for _ in messages:
                pass
    except (ChorusError, TimeoutError):
        return
