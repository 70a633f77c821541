"""Ensembles at work: what `core/ensemble` decides is carried out, each part by the ordinary way of a request.

Parts run beside each other as tasks that hand their messages over on one bounded queue. What comes out of it is passed
on, folded, and acted upon one after the other, so that the caller gets a member's end before the answer, and a caller
who reads slowly slows the members. Only this one task writes to the call: cancelling a write in the middle would
break it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import grpc.aio

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.coordinator.entitlements import of_permitted
from chorus.coordinator.events import EnsembleReport, EventBoard
from chorus.coordinator.live import LiveDirectory
from chorus.coordinator.parts import Part
from chorus.coordinator.placing import Placing
from chorus.coordinator.requests import Requests, Sink
from chorus.core.ensemble.bandit import Outcome
from chorus.core.ensemble.choosing import Offer, offers
from chorus.core.ensemble.learning import Choice, Learner, by_way
from chorus.core.ensemble.machine import (
    Action,
    AskPart,
    CancelPart,
    Conclude,
    Ensemble,
    Fail,
    Give,
    PartAnswered,
    PartBegun,
    PartEvent,
    PartFailed,
    PartPlaced,
    TimePassed,
)
from chorus.core.ensemble.planning import Policy, plan
from chorus.core.ensemble.records import MemberState, Verdict
from chorus.core.ensemble.steps import Task
from chorus.core.ensemble.strategies import STRATEGIES
from chorus.core.ensemble.waves import Room
from chorus.core.errors import ChorusError
from chorus.core.placement import Work
from chorus.telemetry.context import current
from chorus.telemetry.logs import get_logger
from chorus.transport.peer import current_caller
from chorus.wire.ensemble import decode_ensemble, encode_verdict
from chorus.wire.generation import decode_generation, encode_generation

# Messages that members may be ahead of the caller.
_AHEAD = 64
# From so many characters of answers on, what follows from an event is worked out beside the event loop: comparing
# answers takes a millisecond or so for each thousand of them.
_LONG_CHARACTERS = 8_000

_log = get_logger()


@dataclass(frozen=True, slots=True)
class _Message:
    """A part has a message."""

    part: Part
    raw: bytes


@dataclass(frozen=True, slots=True)
class _Failed:
    """A part has failed."""

    part: Part
    error: Exception


class Ensembles:
    """Requests that several models answer. One object serves all callers."""

    def __init__(
        self,
        live: LiveDirectory,
        placing: Placing,
        requests: Requests,
        *,
        events: EventBoard,
        policy: Policy,
        learner: Learner,
    ) -> None:
        self._live = live
        self._placing = placing
        self._requests = requests
        self._events = events
        self._policy = policy
        self._learner = learner

    async def generate(self, request: pb.GenerateRequest, context: Sink) -> None:
        """Generates as `request.ensemble` says, writing the stream to `context`. Raises ChorusErrors."""
        report = EnsembleReport(self._events.request(Work.GENERATE, request.spec.model))
        try:
            spec, generation = decode_ensemble(request.ensemble), decode_generation(request.spec)
            await self._requests.knows_the_mesh(context)
            available = offers(
                generation,
                self._live.directory,
                allow_external=request.fallback.external,
                purse=self._placing.situation().purse,
            )
            available = of_permitted(available, choosing=not spec.members and not generation.model)
            choice = self._learner.choose(spec, generation, available)
            task = plan(by_way(spec, choice.way), generation, available, self._policy)
            ensemble = Ensemble(task, STRATEGIES[task.strategy](task), self._room(task, available))
            under_way = _UnderWay(
                ensemble,
                request,
                context,
                self._requests,
                report,
                final_only=spec.final_only,
                live=self._live,
                learn=self._learning(choice, task),
            )
            await under_way.run()
        except (asyncio.CancelledError, grpc.aio.InternalError):  # the latter: nobody reads what is written
            report.cancelled()
            raise
        except Exception as error:
            report.failed(error)
            raise
        else:
            report.completed()

    def _learning(self, choice: Choice, task: Task) -> Callable[[Verdict | None], None]:
        """Is told how an ensemble fared, None where it failed. Who goes away says nothing of the answer."""
        began, call = self._live.now, current()
        caller, request_id = str(current_caller() or ""), call.request_id if call is not None else ""

        def learn(verdict: Verdict | None) -> None:
            took_s = self._live.now - began
            outcome = Outcome(verdict is not None, took_s, verdict.confidence if verdict is not None else 0.0)
            self._learner.ended(caller, request_id, choice, outcome, task.deadline_s)

        return learn

    def _room(self, task: Task, available: Sequence[Offer]) -> Room:
        """What the mesh has for the ensemble's models."""
        models = {member.model for members in (task.members, *task.simpler) for member in members}
        slots = {model: self._placing.slots(model) for model in models if model}
        loaded = frozenset(offer.model for offer in available if offer.loaded)
        reachable = sum(entry.reachable for entry in self._live.directory.entries.values())
        return Room(
            slots={model: count for model, count in slots.items() if count is not None},
            loaded=loaded,
            models_at_once=max(len(loaded), reachable),
        )


class _PartSink:
    """Where a part's stream goes."""

    def __init__(self, part: Part, news: asyncio.Queue[_Message | _Failed], call: Sink) -> None:
        self._part = part
        self._news = news
        self.time_remaining = call.time_remaining

    async def write(self, message: bytes) -> None:
        await self._news.put(_Message(self._part, message))


class _UnderWay:
    """One ensemble: its parts, their tasks, and the call that it answers."""

    def __init__(
        self,
        ensemble: Ensemble,
        request: pb.GenerateRequest,
        context: Sink,
        requests: Requests,
        report: EnsembleReport,
        *,
        final_only: bool,
        live: LiveDirectory,
        learn: Callable[[Verdict | None], None],
    ) -> None:
        self._ensemble = ensemble
        self._request = request
        self._context = context
        self._requests = requests
        self._report = report
        self._final_only = final_only
        self._live = live
        self._learn = learn
        asked = request.ensemble
        self._named = {request.spec.model, asked.aggregator_model, *(member.model for member in asked.members)}
        self._parts: dict[str, Part] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news: asyncio.Queue[_Message | _Failed] = asyncio.Queue(_AHEAD)
        self._characters = 0  # of all answers that have come

    async def run(self) -> None:
        """Writes the whole stream. Raises the ChorusError that it fails with; however it ends, every part has ended."""
        try:
            await self._act(self._ensemble.begin(self._live.now))
            while not self._ensemble.over:
                await self._act(await self._next())
            # Parts that are whole close their streams; cut off now, their runners would see callers that went away.
            ending = [self._tasks[part_id] for part_id in self._parts]
            if ending:
                await asyncio.wait(ending)
        finally:
            for task in self._tasks.values():
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks.values())

    async def _next(self) -> Sequence[Action]:
        """What follows from what happens next."""
        look_at = self._ensemble.look_at
        left_s = None if look_at is None else look_at - self._live.now
        if left_s is not None and left_s <= 0:  # whether or not there are messages, of which there may be many
            return await self._take(TimePassed())
        try:
            async with asyncio.timeout(left_s):
                news = await self._news.get()
        except TimeoutError:
            return []
        part = news.part
        if self._parts.get(part.part_id) is not part:  # waited for no more
            return []
        if isinstance(news, _Message):
            told, happened = part.take(news.raw)
            for message in told:
                await self._context.write(message)
            return await self._take(happened) if happened is not None else []
        if not isinstance(news.error, ChorusError):
            raise news.error
        return await self._take(PartFailed(part.part_id, news.error, part.begun))

    async def _take(self, event: PartEvent) -> Sequence[Action]:
        """What follows from an event; nothing else happens to the ensemble meanwhile."""
        if isinstance(event, PartAnswered):
            self._characters += len(event.answer.text)
        if self._characters < _LONG_CHARACTERS or isinstance(event, PartPlaced | PartBegun):
            return self._ensemble.take(event, self._live.now)
        return await asyncio.to_thread(self._ensemble.take, event, self._live.now)

    async def _act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case AskPart():
                    self._ask(action)
                case CancelPart(part_id):
                    del self._parts[part_id]
                    self._tasks[part_id].cancel()
                case Give(part_id, verdict) | Conclude(part_id, verdict):
                    await self._conclude(self._parts[part_id], verdict, was_streamed=isinstance(action, Conclude))
                case Fail(error):
                    self._learn(None)
                    raise error

    def _ask(self, action: AskPart) -> None:
        wants_logprobs = self._request.spec.HasField("logprobs")
        part = Part(action, wants_logprobs=wants_logprobs, final_only=self._final_only)
        self._parts[part.part_id] = part
        message = pb.GenerateRequest(
            spec=encode_generation(action.ask.request),
            attempt=1,
            fallback=self._request.fallback,
            allow_hedging=self._request.allow_hedging,
        )
        self._tasks[part.part_id] = asyncio.create_task(self._generate(part, message))

    async def _generate(self, part: Part, message: pb.GenerateRequest) -> None:
        try:
            sink = _PartSink(part, self._news, self._context)
            await self._requests.generate(
                message,
                sink,
                self._report.member(),
                member_id=part.part_id,
                is_named=message.spec.model in self._named,
            )
        except Exception as error:
            await self._news.put(_Failed(part, error))

    async def _conclude(self, part: Part, verdict: Verdict, *, was_streamed: bool) -> None:
        # Those that are late are left by now, and cost what they have brought.
        verdict = replace(verdict, cost_micro_usd=self._report.tab.cost)
        for message in part.held if was_streamed else part.beginning():
            await self._context.write(message)
        await self._context.write(pb.GenerateResponse(verdict=encode_verdict(verdict)).SerializeToString())
        self._learn(verdict)  # before the end: whoever has that may rate the answer
        await self._context.write(part.end())
        _log.info(
            "ensemble.finished",
            strategy=verdict.strategy,
            complexity=verdict.complexity,
            seconds=round(verdict.elapsed_s, 6),
            asked=verdict.asked,
            agreement=round(verdict.agreement, 3),
            confidence=round(verdict.confidence, 3),
            **{str(state): verdict.count(state) for state in MemberState},
        )
