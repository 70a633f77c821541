"""Answers given again, in front of everything that makes new ones.

A request that may have one (`core/cache/policy.py`) gets the answer to the very same request, or to a question that has
the same answer (`semantic.py`); else it is run, once for all who ask the same at the time (`flights.py`), and what came
of it is kept. Callers share nothing. A disk or a server that fails only costs hits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from chorus.api.coordinator.v1 import cache_pb2, coordinator_pb2
from chorus.config import CacheSettings
from chorus.coordinator.asked import Asked, AskedReader
from chorus.coordinator.flights import Flight
from chorus.coordinator.live import LiveDirectory
from chorus.coordinator.placing import Placing
from chorus.coordinator.requests import Sink
from chorus.coordinator.semantic import Hint, SemanticHits
from chorus.core.cache.clears import Clears
from chorus.core.cache.policy import CacheMode, Permission
from chorus.core.cache.report import CacheOutcome, CacheReport
from chorus.core.errors import (
    BudgetExhaustedError,
    ChorusError,
    NoCapableRunnerError,
    OverloadedError,
    PermissionDeniedError,
    RunnersUnavailableError,
    UnavailableError,
    UnknownModelError,
)
from chorus.core.identity import Role
from chorus.core.placement import artifacts_of
from chorus.store.answer_store import STORE_ERRORS, Answers
from chorus.store.answers import Kept, NewAnswer
from chorus.telemetry.cache_metrics import CacheMetrics
from chorus.telemetry.context import current
from chorus.telemetry.logs import get_logger
from chorus.transport.guarding import is_being_cancelled
from chorus.transport.peer import current_caller
from chorus.wire.cache import MODES, Recorded, encode_report, record, renamed, replay
from chorus.wire.resources import encode_duration

# With how long whoever asks waits to be admitted, in seconds; None: as long as the sink has time.
Generate = Callable[[coordinator_pb2.GenerateRequest, Sink, float | None], Coroutine[Any, Any, None]]

# What an old answer is better than: nobody is there who could give a new one.
_NOBODY = (RunnersUnavailableError, NoCapableRunnerError, UnknownModelError, OverloadedError, BudgetExhaustedError)
_EVER = float("-inf")

_log = get_logger()


class _Noting:
    """A sink that knows whether an answer has begun."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.started = False

    async def write(self, message: bytes) -> None:
        """Passes it on."""
        if not self.started:
            kind = coordinator_pb2.GenerateResponse.FromString(message).event.WhichOneof("event")
            self.started = kind not in (None, "queued", "progress")
        await self._sink.write(message)

    def time_remaining(self) -> float | None:
        """That of the sink."""
        return self._sink.time_remaining()


class AnswerCache:
    """The cache of one coordinator. `generate` is what makes new answers; `wall` seconds since the epoch."""

    def __init__(
        self,
        settings: CacheSettings,
        generate: Generate,
        *,
        live: LiveDirectory,
        placing: Placing,
        semantic: SemanticHits,
        store: Answers,
        metrics: CacheMetrics,
        on_hit: Callable[[str, int], None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`on_hit` is told the model and the tokens of each answer that was given without being made for it."""
        self._settings = settings
        self._default = CacheMode(settings.mode)
        self._generate = generate
        self._live = live
        self._reader = AskedReader(settings, placing)
        self._semantic = semantic
        self._store = store
        self._metrics = metrics
        self._on_hit = on_hit
        self._wall = wall
        self._flights: dict[tuple[str, Permission], Flight] = {}
        self._keeping: set[asyncio.Task[None]] = set()
        self._clears = Clears()
        self._store_fails = False

    async def close(self) -> None:
        """Lets what is being kept be kept, and closes the store."""
        if self._keeping:
            await asyncio.wait(self._keeping)
        with suppress(*STORE_ERRORS):
            await self._store.close()

    async def generate(self, request: coordinator_pb2.GenerateRequest, context: Sink) -> None:
        """Answers a request, out of the cache where it may be."""
        asked = self._reader.read(request)
        if asked is None:
            await self._generate(request, context, None)
            return
        if not request.fallback.cached_answer or not asked.plan.asks_store:
            await self._answer(asked, request, context)
            return
        noting = _Noting(context)
        try:
            await self._answer(asked, request, noting)
        except _NOBODY:
            if noting.started or not await self._old_answer(asked, context):
                raise

    # --- one request ------------------------------------------------------------------------------------------------

    async def _answer(self, asked: Asked, request: coordinator_pb2.GenerateRequest, context: Sink) -> None:
        if asked.plan.mode is CacheMode.OFF:
            if asked.told:
                await self._tell(context, CacheReport(CacheOutcome.BYPASSED, reason=asked.plan.reason))
            await self._generate(request, context, None)
            return
        now, sha256s = self._wall(), self._artifacts(asked)
        if await self._exact(asked, context, sha256s):
            return
        hint = None
        if asked.plan.mode is CacheMode.SEMANTIC and not self._is_under_way(asked, context):
            hint = await self._semantic.look(
                asked.normalised, asked.caller, sha256s, asked.permission, since=asked.since(now), sink=context
            )
            if hint.kept is not None and not hint.explores:
                report = CacheReport(
                    CacheOutcome.SEMANTIC,
                    max(0.0, now - hint.kept.made),
                    hint.kept.question,
                    hint.kept.cosine,
                    hint.confidence,
                )
                await self._give(asked, hint.kept, report, context)
                self._store.touch(hint.kept.id, now)
                return
            # Meanwhile an identical request may have been run and its answer kept.
            if await self._exact(asked, context, sha256s):
                return
        await self._fly(asked, request, context, hint)

    def _is_under_way(self, asked: Asked, context: Sink) -> bool:
        flight = self._flights.get(asked.flight)
        return flight is not None and flight.serves(context.time_remaining())

    async def _exact(self, asked: Asked, context: Sink, sha256s: Sequence[str]) -> bool:
        """Gives the answer to the very same request; False: there is none.

        Where there is none, whoever calls this has to look at the runs under way before it waits for anything: a run
        goes on being one of them until the store has its answer, so that one of the two always knows it.
        """
        if self._is_under_way(asked, context):
            return False
        now = self._wall()
        kept = await self._found(self._store.find(asked.key, sha256s, since=asked.since(now), now=now))
        if kept is None:
            return False
        await self._give(asked, kept, CacheReport(CacheOutcome.EXACT, max(0.0, now - kept.made)), context)
        return True

    async def _fly(
        self, asked: Asked, request: coordinator_pb2.GenerateRequest, context: Sink, hint: Hint | None
    ) -> None:
        """Reads the answer of an identical request under way, or begins it."""
        left_s = context.time_remaining()
        reason = asked.plan.reason or (hint.problem if hint is not None else "")
        flight = self._flights.get(asked.flight)
        if flight is not None and flight.serves(left_s):
            await self._join(flight, asked, request, context, reason)
            return
        self._metrics.request(CacheOutcome.MISS)
        flight = Flight(
            lambda sink, admitted_within_s: self._generate(request, sink, admitted_within_s),
            time_left_s=left_s,
            clock=lambda: self._live.now,
        )
        self._flights[asked.flight] = flight
        begun = self._clears.seen_by(asked.caller)
        flight.task.add_done_callback(lambda _: self._landed(asked, flight, hint, begun))
        first = _message(CacheReport(CacheOutcome.MISS, reason=reason)) if asked.told else None
        await flight.read(context.write, first=first)

    async def _join(
        self,
        flight: Flight,
        asked: Asked,
        request: coordinator_pb2.GenerateRequest,
        context: Sink,
        reason: str,
    ) -> None:
        """Reads along with an identical request; where that fails before anything came, this one is run by itself."""
        written = named = False

        async def write(message: bytes) -> None:
            nonlocal written, named
            if not written:
                written = True
                await self._tell(context, CacheReport(CacheOutcome.JOINED, reason=reason), asked.told)
            if not named:
                message, named = renamed(message, request_id=_request_id())
            await context.write(message)

        try:
            await flight.read(write)
        except (ChorusError, asyncio.CancelledError):
            if written or is_being_cancelled():
                raise
            await self._generate(request, context, None)
        else:
            self._metrics.request(CacheOutcome.JOINED, _tokens(flight))
            self._on_hit(asked.normalised.model, _tokens(flight))

    def _landed(self, asked: Asked, flight: Flight, hint: Hint | None, begun: tuple[int, int]) -> None:
        """The run has ended: its answer is kept, if it is one; until then those who ask the same read its stream.

        `begun`: what was cleared by its beginning; an answer that was not there yet is to be forgotten as well.
        """

        def gone(task: asyncio.Task[None] | None = None) -> None:
            if task is not None:
                self._keeping.discard(task)
            if self._flights.get(asked.flight) is flight:
                del self._flights[asked.flight]

        if flight.task.cancelled() or not flight.whole:
            gone()
            return
        task = asyncio.get_running_loop().create_task(self._keep(asked, flight.messages, hint, begun))
        self._keeping.add(task)
        task.add_done_callback(gone)

    async def _keep(self, asked: Asked, messages: list[bytes], hint: Hint | None, begun: tuple[int, int]) -> None:
        recorded = record(messages)
        if recorded is None:
            return
        if hint is not None and hint.kept is not None:
            await self._compare(hint.kept, recorded)
        new = NewAnswer(asked.key, recorded.sha256, asked.caller, recorded.answer, recorded.tokens)
        if hint is not None and hint.vector is not None:
            new = replace(new, question=hint.question, bucket=hint.bucket, vector=hint.vector)
        if self._clears.seen_by(asked.caller) == begun:
            await self._found(self._store.put(new, self._wall()))

    async def _compare(self, kept: Kept, recorded: Recorded) -> None:
        # Answers may be long, and no stream may wait for their comparison.
        alike = await asyncio.to_thread(self._semantic.alike, kept, recorded)
        self._metrics.compared(alike=alike)
        await self._found(self._store.judged(kept.id, right=alike))

    async def _old_answer(self, asked: Asked, context: Sink) -> bool:
        """Gives any earlier answer to the very same request, where nobody can give a new one; False: there is none."""
        now = self._wall()
        kept = await self._found(self._store.find(asked.key, None, since=_EVER, now=now))
        if kept is None:
            return False
        report = CacheReport(CacheOutcome.STALE, max(0.0, now - kept.made), reason="nobody can serve the request now")
        await self._give(asked, kept, report, context)
        return True

    async def _give(self, asked: Asked, kept: Kept, report: CacheReport, context: Sink) -> None:
        for message in replay(kept.answer, report, request_id=_request_id(), together=asked.together):
            await context.write(message)
        self._metrics.request(report.outcome, kept.tokens)
        self._on_hit(asked.normalised.model, kept.tokens)

    async def _tell(self, context: Sink, report: CacheReport, told: bool = True) -> None:
        if report.outcome is CacheOutcome.BYPASSED:
            self._metrics.request(report.outcome)
        if told:
            await context.write(_message(report))

    async def _found(self, asking: Awaitable[Any]) -> Any:
        """What the store says; nothing where it can't, of which the first time is told."""
        try:
            answer = await asking
        except STORE_ERRORS as error:
            if not self._store_fails:
                _log.warning("cache.store_failed", why=str(error)[:200])
            self._store_fails = True
            return None
        self._store_fails = False
        return answer

    def _artifacts(self, asked: Asked) -> tuple[str, ...]:
        """The content of the files that may answer now: an answer by another one is of another model."""
        return artifacts_of(self._live.directory, asked.normalised.model)

    # --- what is asked about it -------------------------------------------------------------------------------------

    async def summary(self) -> cache_pb2.GetCacheResponse:
        """What it holds of the caller, or for an admin of everybody, and what it has done."""
        caller = current_caller()
        everybody = caller is None or caller.role is Role.ADMIN
        entries, size = await self._found(self._store.count(None if everybody else str(caller))) or (0, 0)
        outcomes, explored = self._metrics.outcomes, self._metrics.explored
        return cache_pb2.GetCacheResponse(
            default_mode=MODES[self._default],
            entry_count=entries,
            size_bytes=size,
            max_entries=self._settings.max_entries,
            max_bytes=self._settings.max_mib << 20,
            ttl=encode_duration(self._settings.ttl_s),
            exact_hit_count=outcomes[CacheOutcome.EXACT],
            semantic_hit_count=outcomes[CacheOutcome.SEMANTIC],
            joined_count=outcomes[CacheOutcome.JOINED],
            miss_count=outcomes[CacheOutcome.MISS],
            explored_count=explored.total(),
            explored_wrong_count=explored[False],
            saved_token_count=self._metrics.saved_tokens,
            semantic_problem=self._semantic.problem(),
        )

    @property
    def is_shared(self) -> bool:
        """Whether its store is that of other coordinators, too."""
        return self._settings.is_shared

    async def clear(self, *, everybody: bool) -> int:
        """Forgets the caller's answers, or everybody's, those among them that are just being made.

        Raises PermissionDeniedError for a client that asks so, UnavailableError where the store can't be asked.
        """
        caller = current_caller()
        if everybody and caller is not None and caller.role is not Role.ADMIN:
            raise PermissionDeniedError("only an admin may clear everybody's answers; without it, yours are cleared")
        whose = None if everybody else str(caller or "")
        self._clears.cleared(whose)
        if self._keeping:  # a store on a network may take what was sent later first
            await asyncio.wait(self._keeping)
        try:
            return await self._store.clear(whose)
        except STORE_ERRORS as error:
            raise UnavailableError(f"the answers are not forgotten, since their store failed: {error}") from error


def _message(report: CacheReport) -> bytes:
    return coordinator_pb2.GenerateResponse(cache=encode_report(report)).SerializeToString()


def _tokens(flight: Flight) -> int:
    last = coordinator_pb2.GenerateResponse.FromString(flight.messages[-1])
    return last.event.finished.usage.completion_token_count


def _request_id() -> str:
    context = current()
    return context.request_id if context is not None else ""
