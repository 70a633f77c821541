"""The events of a running coordinator: the log with clocks, and readers that wait for news."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from chorus.core.costs import Tab
from chorus.core.errors import CancelledError, ChorusError, DrainingError, InternalError
from chorus.core.events import (
    KIND_OF,
    Bookmark,
    Cursor,
    Detail,
    Event,
    EventFilter,
    EventKind,
    EventLog,
    EventReader,
    FleetEvents,
    Outcome,
    RequestAdmitted,
    RequestFinished,
    RequestRefused,
    Subject,
    Told,
)
from chorus.core.fleet.directory import DirectoryChange
from chorus.core.fleet.records import EngineKind
from chorus.core.generation import Priority
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.tickets import TicketUse
from chorus.core.placement import Candidate, Work
from chorus.core.resilience.delivered import Delivered
from chorus.telemetry import context
from chorus.transport.peer import current_caller

BOOKMARK_INTERVAL_S = 0.8
"""Readers may count on something every second; the rest is for the way."""

FLUSH_INTERVAL_S = 0.05
"""For so long events are gathered after one was told: a busy coordinator sends batches, not thousands of messages."""

# Callers may make up names of models; errors may quote what callers wrote.
_NAME_MAX = 100
_MESSAGE_MAX = 500

Listener = Callable[[Event], None]


class EventBoard:
    """An EventLog on one event loop. `clock` is monotonic, `wall` is since the Unix epoch, both in seconds.

    Noting something never waits and never fails; readers come for it when they can.
    """

    def __init__(self, log: EventLog, *, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self.log = log
        self._clock = clock
        self._wall = wall
        self._fleet = FleetEvents()
        self._listeners: list[Listener] = []
        self._changed = asyncio.Event()  # replaced at every event: whoever has the old one is woken
        self._closed = False

    @property
    def now(self) -> float:
        """The monotonic clock."""
        return self._clock()

    def on_event(self, listener: Listener) -> None:
        """Has `listener` told of every event. It must be quick and must not raise."""
        self._listeners.append(listener)

    def note(self, what: Detail | EventKind, subject: Subject) -> None:
        """Something happened; a detail has its kind."""
        detail = None if isinstance(what, EventKind) else what
        kind = what if isinstance(what, EventKind) else KIND_OF[type(what)]
        event = self.log.append(self._wall(), kind, subject, detail)
        for listener in self._listeners:
            listener(event)
        self._changed.set()
        self._changed = asyncio.Event()

    def follow(self, change: DirectoryChange) -> None:
        """The directory changed."""
        for kind, subject, detail in self._fleet.follow(change):
            self.note(kind if detail is None else detail, subject)

    def of_attempt(self, detail: Detail, candidate: Candidate) -> None:
        """Something happened to a try of the request that is being handled."""
        self.note(detail, subject_of(candidate))

    def of_request(self, detail: Detail, model: str) -> None:
        """Something happened to the request that is being handled, whoever will run it."""
        self.note(detail, Subject(_request_id(), _caller(), model))

    def request(self, work: Work, model: str) -> RequestReport:
        """What is to be told of the request that is being handled, from its arrival on."""
        return RequestReport(self, work, model)

    async def watch(
        self, condition: EventFilter, *, after: Cursor | None = None, since_s: float | None = None
    ) -> AsyncGenerator[Told]:
        """Yields what one reader is to be told, a bookmark at once; `since_s` is that many seconds ago.

        Raises DrainingError when the board closes, once all has been told.
        """
        since = None if since_s is None else self._wall() - since_s
        reader = EventReader(self.log, condition, after=after, since=since)
        told: Told = reader.take() if reader.misses_some else Bookmark(reader.cursor)
        while True:
            yield told
            told = await self._next(reader, self.now)

    async def _next(self, reader: EventReader, told_at: float) -> Told:
        """What a reader is to be told next. The first news go out at once; those that follow closely are gathered."""
        looked_at = told_at
        while True:
            if not reader.pending:
                await self._news(reader, told_at + BOOKMARK_INTERVAL_S - self.now)
                await self._pause(looked_at + FLUSH_INTERVAL_S - self.now)
            if self._closed and not reader.pending:
                raise DrainingError("this coordinator is stopping; watch another one, or this one again")
            told, looked_at = reader.take(), self.now
            if not isinstance(told, Bookmark) or looked_at - told_at >= BOOKMARK_INTERVAL_S:
                return told
            await asyncio.sleep(0)  # where much came that it does not want, others have their turn in between

    def close(self) -> None:
        """Ends every watch."""
        self._closed = True
        self._changed.set()

    async def _pause(self, seconds: float) -> None:
        if seconds > 0 and not self._closed:
            await asyncio.sleep(seconds)

    async def _news(self, reader: EventReader, timeout_s: float) -> None:
        """Returns when there is something new, the board has closed, or after `timeout_s`."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                while not (self._closed or reader.pending):
                    await self._changed.wait()
        except TimeoutError:
            return


def subject_of(candidate: Candidate) -> Subject:
    """The request that is being handled, on a runner."""
    artifact = candidate.model.artifact
    return Subject(_request_id(), _caller(), artifact.family, artifact.name, candidate.runner_id, candidate.node_id)


class GenerationReport(Protocol):
    """Is told what happens to a generation; see RequestReport."""

    tab: Tab

    def admitted(self, priority: Priority, /) -> None: ...
    def asked(self, candidate: Candidate, number: int, /) -> None: ...
    def failed(self, error: Exception, delivered: Delivered | None, /) -> None: ...
    def cancelled(self, delivered: Delivered | None, /) -> None: ...
    def completed(self, delivered: Delivered | None, /) -> None: ...


class RequestReport:
    """What happens to one request, told as it happens: admitted, then refused or finished, each once.

    It is refused where it ends before any runner was asked.
    """

    def __init__(self, board: EventBoard, work: Work, model: str) -> None:
        self._board = board
        self._work = work
        self._subject = Subject(_request_id(), _caller(), model[:_NAME_MAX])
        self._arrived = board.now
        self._admitted_at: float | None = None
        self._engine = EngineKind.LOCAL
        self._attempts = 0
        self.tab = Tab()
        """What paid providers are owed for it."""

    def admitted(self, priority: Priority = Priority.INTERACTIVE) -> None:
        """Its turn has come."""
        self._admitted_at = self._board.now
        self._board.note(RequestAdmitted(self._work, priority, self._queue_s()), self._subject)

    def asked(self, candidate: Candidate, number: int) -> None:
        """A runner is asked, as the try of that number."""
        self._subject = subject_of(candidate)
        self.tried(candidate, number)

    def tried(self, candidate: Candidate, number: int) -> None:
        """A runner is asked for a part of it, as the try of that number, of which it isn't named."""
        self._attempts = number
        for engine in candidate.entry.record.runner.engines:
            if engine.name == candidate.model.engine:
                self._engine = engine.kind

    def failed(self, error: Exception, delivered: Delivered | None = None) -> None:
        """It ends with an error; one that isn't of the mesh's is a defect, of which its caller learns no more."""
        if not isinstance(error, ChorusError):
            error = InternalError("internal error")
        message = error.message[:_MESSAGE_MAX]
        if self._attempts:
            return self._finished(Outcome.FAILED, delivered, reason=error.reason, message=message)
        refused = RequestRefused(self._work, error.reason, message, error.retry_after_s, self._queue_s())
        return self._board.note(refused, self._subject)

    def cancelled(self, delivered: Delivered | None = None) -> None:
        """Its caller went away."""
        has_all = delivered is not None and delivered.finished
        self._finished(Outcome.COMPLETED if has_all else Outcome.CANCELLED, delivered)

    def completed(self, delivered: Delivered | None = None) -> None:
        """Its caller has the whole answer."""
        self._finished(Outcome.COMPLETED, delivered)

    def told(self, use: TicketUse, error: ChorusError | None) -> None:
        """It ended at the runner that its caller asked itself."""
        gone = isinstance(error, CancelledError)
        decode_s = use.seconds - (use.first_token_s or 0.0)
        finished = RequestFinished(
            work=self._work,
            outcome=Outcome.COMPLETED if error is None else Outcome.CANCELLED if gone else Outcome.FAILED,
            reason=error.reason if error is not None and not gone else "",
            message=error.message[:_MESSAGE_MAX] if error is not None and not gone else "",
            attempts=self._attempts,
            engine=self._engine,
            queue_s=self._queue_s(),
            # Of the way to the runner nobody tells us: waiting here, then what the runner measured.
            first_token_s=None if use.first_token_s is None else self._queue_s() + use.first_token_s,
            total_s=self._queue_s() + use.seconds,
            prompt_tokens=use.prompt_tokens,
            cached_tokens=use.cached_tokens,
            output_tokens=use.output_tokens,
            tokens_per_second=(use.output_tokens - 1) / decode_s if use.output_tokens > 1 and decode_s > 0 else 0.0,
        )
        self._board.note(finished, self._subject)

    def _finished(self, outcome: Outcome, delivered: Delivered | None, *, reason: str = "", message: str = "") -> None:
        figures = delivered if delivered is not None else Delivered()
        rate = first_s = 0.0
        if figures.first_at is not None and figures.last_at is not None:
            first_s = figures.first_at - self._arrived
            decode_s = figures.last_at - figures.first_at
            rate = (figures.output_tokens - 1) / decode_s if decode_s > 0 else 0.0
        finished = RequestFinished(
            work=self._work,
            outcome=outcome,
            reason=reason,
            message=message,
            attempts=self._attempts,
            engine=self._engine,
            queue_s=self._queue_s(),
            first_token_s=None if figures.first_at is None else first_s,
            total_s=self._board.now - self._arrived,
            prompt_tokens=figures.prompt_tokens,
            cached_tokens=figures.cached_tokens,
            output_tokens=figures.output_tokens,
            tokens_per_second=rate,
            cost_micro_usd=self.tab.cost,
            external=self.tab.was_used,
        )
        self._board.note(finished, self._subject)

    def _queue_s(self) -> float:
        until = self._admitted_at if self._admitted_at is not None else self._board.now
        return until - self._arrived


class EnsembleReport:
    """What happens to one request whose members are each generated as a request is: they are its tries."""

    def __init__(self, report: RequestReport) -> None:
        self._report = report
        self._admitted = False
        self._asked = 0
        self._sum = Delivered()

    def member(self) -> MemberReport:
        """What is told of a member."""
        member = MemberReport(self)
        self.tab.parts.append(member.tab)
        return member

    @property
    def tab(self) -> Tab:
        """What paid providers are owed for the request, its members included."""
        return self._report.tab

    def member_admitted(self, priority: Priority) -> None:
        """A member's turn has come; the first one's is the request's."""
        if not self._admitted:
            self._admitted = True
            self._report.admitted(priority)

    def member_asked(self, candidate: Candidate) -> None:
        """A runner is asked for a member."""
        self._asked += 1
        self._report.tried(candidate, self._asked)

    def member_ended(self, delivered: Delivered | None) -> None:
        """A member has ended, having brought so much."""
        if delivered is None:
            return
        whole = self._sum
        whole.prompt_tokens += delivered.prompt_tokens
        whole.cached_tokens += delivered.cached_tokens
        whole.output_tokens += delivered.output_tokens
        times = [at for at in (whole.first_at, delivered.first_at) if at is not None]
        whole.first_at = min(times, default=None)
        whole.last_at = max((at for at in (whole.last_at, delivered.last_at) if at is not None), default=None)

    def failed(self, error: Exception) -> None:
        """It ends with an error."""
        self._report.failed(error, self._sum)

    def cancelled(self) -> None:
        """Its caller went away."""
        self._report.cancelled(self._sum)

    def completed(self) -> None:
        """Its caller has the whole answer."""
        self._report.completed(self._sum)


class MemberReport:
    """A GenerationReport of a member of an ensemble."""

    def __init__(self, ensemble: EnsembleReport) -> None:
        self._ensemble = ensemble
        self.tab = Tab()

    def admitted(self, priority: Priority = Priority.INTERACTIVE) -> None:
        """Its turn has come."""
        self._ensemble.member_admitted(priority)

    def asked(self, candidate: Candidate, _number: int) -> None:
        """A runner is asked."""
        self._ensemble.member_asked(candidate)

    def failed(self, _error: Exception, delivered: Delivered | None = None) -> None:
        """It ends with an error, of which the verdict tells."""
        self._ensemble.member_ended(delivered)

    def cancelled(self, delivered: Delivered | None = None) -> None:
        """Nobody waits for it any more."""
        self._ensemble.member_ended(delivered)

    def completed(self, delivered: Delivered | None = None) -> None:
        """It is whole."""
        self._ensemble.member_ended(delivered)


def reader_of(caller: SpiffeId | None) -> str:
    """Whose requests alone a reader is told of; empty for admins, and where nobody is authenticated: everybody's."""
    return "" if caller is None or caller.role is Role.ADMIN else str(caller)


def _request_id() -> str:
    found = context.current()
    return found.request_id if found is not None else ""


def _caller() -> str:
    return str(current_caller() or "")
