"""Costs at work: paid providers are asked within the budget, and what requests cost is kept in the ledger.

An amount is reserved before a provider is asked and settled once its attempt has ended, however it ends; a placement
looks at the books as they were last seen, and the ledger decides. What has become of requests is written by a thread,
many at once where many end together, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from chorus.config.costs import CostSettings
from chorus.coordinator.events import reader_of
from chorus.coordinator.live import LiveDirectory
from chorus.core.costs import Asked, Bill, Books, Entry, Purse, Report, Tab, Where
from chorus.core.costs.bills import UPSTREAM_LOST
from chorus.core.costs.budget import day_of, month_of
from chorus.core.costs.purse import exhausted, most_of, price_of
from chorus.core.errors import (
    ChorusError,
    ConfigError,
    DeadlineExceededError,
    RunnersUnavailableError,
    UnavailableError,
)
from chorus.core.events import Event, Outcome, RequestFinished
from chorus.core.placement import Candidate, Needs, Work, is_external
from chorus.core.placement.needs import LIKELY_CHARACTERS_PER_TOKEN
from chorus.core.resilience.retries import LOST
from chorus.store.file_thread import FileThread
from chorus.store.ledger import LedgerFile, Reservation
from chorus.telemetry.context import current
from chorus.telemetry.logs import get_logger
from chorus.transport.peer import current_caller

# What other coordinators of this machine have spent is looked at so often, besides each time a provider is asked.
_LOOK_S = 1.0
# A request without a deadline is over by then; one with a deadline some time after it.
_LASTS_S = 86_400.0
_SLACK_S = 60.0
# So long requests that have ended are gathered: a transaction for each costs a cached answer a tenth of its time, while
# the next one is under way.
_GATHERED_S = 0.05
# Requests that wait while the disk takes none; further ones are lost.
_BACKLOG_MAX = 20_000
_NAME_MAX = 100

_log = get_logger()


class Costs:
    """The costs of one coordinator, `name`, on one event loop. `wall` is seconds since the Unix epoch.

    Raises ConfigError for a budget without a file: in memory it would be forgotten at the next start.
    """

    def __init__(
        self, settings: CostSettings, live: LiveDirectory, *, name: str, wall: Callable[[], float] = time.time
    ) -> None:
        self._limits, self._prices, self._baseline = settings.limits, settings.price_list, settings.baseline
        if settings.file is None and self._limits:
            raise ConfigError(
                "costs.file: a budget needs one, since a coordinator that keeps its ledger in memory forgets at the "
                "next start what was spent",
                metadata={"keys": "costs.file"},
            )
        self._settings = settings
        self._live = live
        self._name = name
        self._wall = wall
        self._books = Books(day_of(wall()))
        self._entries: deque[Entry] = deque(maxlen=_BACKLOG_MAX)
        self._thread = FileThread(self._open, name="ledger")
        self._settling: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None
        self._writing: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Opens the ledger. Raises ConfigError where its file can't be had."""
        try:
            self._books = await self._thread.run(lambda file: file.books(self._wall()))
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"costs.file: the ledger can't be opened: {error}", metadata={"keys": "costs.file"}
            ) from error
        if self._limits:
            self._looking = asyncio.create_task(self._look())

    async def close(self) -> None:
        """Writes what is not written yet, and closes the ledger."""
        if self._looking is not None:
            self._looking.cancel()
        if self._writing is not None:
            self._writing.cancel()
        if self._settling:
            await asyncio.wait(self._settling)
        with suppress(sqlite3.Error):
            await self._thread.close(self._write)

    # --- what placement asks ----------------------------------------------------------------------------------------

    def purse(self) -> Purse | None:
        """What providers may cost now; None: whatever they do."""
        if not self._limits:
            return None
        now = self._wall()
        books = self._books.at(day_of(now))
        return Purse(self._prices, self._limits, books, self._settings.answer_tokens, now)

    # --- one attempt ------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def billed(
        self,
        candidate: Candidate,
        needs: Needs,
        tab: Tab,
        *,
        time_left_s: float | None,
        delivered: Callable[[], int] = lambda: 0,
    ) -> AsyncIterator[Bill | None]:
        """The block is an attempt; one on a paid provider is put on `tab`, the others cost nothing (None).

        `delivered` tells how many tokens of the answer have come, those of earlier attempts included. Raises
        BudgetExhaustedError, and RunnersUnavailableError where there is a budget and the ledger can't be written.
        """
        if not is_external(candidate.entry.record, candidate.model):
            yield None
            return
        bill, reservation_id = await self._open_bill(candidate, needs, delivered, time_left_s)
        tab.bills.append(bill)
        try:
            yield bill
        except ChorusError as error:
            bill.refused = not bill.began and _is_refusal(error)
            raise
        finally:
            self._settle(reservation_id, bill.cost)

    async def _open_bill(
        self, candidate: Candidate, needs: Needs, delivered: Callable[[], int], time_left_s: float | None
    ) -> tuple[Bill, str]:
        artifact, now = candidate.model.artifact, self._wall()
        price, came = price_of(self._prices, artifact), delivered()
        prompt_tokens = needs.most_prompt_tokens + came
        assumed = self._settings.answer_tokens
        amount = 0 if price is None else most_of(price, prompt_tokens, needs.answer_tokens, assumed=assumed)
        likely = needs.likely_prompt_tokens or needs.most_prompt_tokens // LIKELY_CHARACTERS_PER_TOKEN
        bill = Bill(candidate.runner_id, artifact.family, price, likely + came, delivered)
        asked = Reservation(
            id=uuid.uuid4().hex,
            caller=str(current_caller() or ""),
            model=artifact.family[:_NAME_MAX],
            amount=amount,
            lapses=now + (_LASTS_S if time_left_s is None else time_left_s) + _SLACK_S,
        )
        await self._reserve(asked, now)
        return bill, asked.id

    async def _reserve(self, asked: Reservation, now: float) -> None:
        try:
            self._books, lack = await self._thread.run(lambda file: file.reserve(asked, self._limits, now))
        except (OSError, sqlite3.Error) as error:
            _log.error("costs.ledger_failed", why=str(error)[:200])
            if self._limits:
                raise RunnersUnavailableError(
                    f"the cost ledger can't be written, and without it no paid provider is asked: {error}; see to "
                    "costs.file at the coordinator"
                ) from error
        except BaseException:  # the caller went away; what the thread may have reserved comes before this
            self._settle(asked.id, 0)
            raise
        else:
            if lack is not None:
                raise exhausted(lack)

    def _settle(self, reservation_id: str, spent: int) -> None:
        async def settle() -> None:
            try:
                self._books = await self._thread.run(lambda file: file.settle(reservation_id, spent, self._wall()))
            except (OSError, sqlite3.Error, RuntimeError) as error:  # it stays reserved, and lapses as spent
                _log.error("costs.ledger_failed", why=str(error)[:200])

        task = asyncio.get_running_loop().create_task(settle())
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    # --- what became of requests ------------------------------------------------------------------------------------

    def take(self, event: Event) -> None:
        """Something happened; generations that have ended are noted."""
        ended = event.detail
        if not isinstance(ended, RequestFinished) or ended.work is not Work.GENERATE:
            return
        completed = ended.outcome is Outcome.COMPLETED
        self._note(
            Entry(
                at=event.at,
                request_id=event.subject.request_id,
                caller=event.subject.caller,
                model=event.subject.model,
                where=Where.EXTERNAL if ended.external else Where.LOCAL,
                completed=completed,
                prompt_tokens=ended.prompt_tokens,
                output_tokens=ended.output_tokens,
                spent=ended.cost_micro_usd,
                avoided=(self._baseline or 0) if completed and not ended.external else 0,
            )
        )

    def hit(self, model: str, tokens: int) -> None:
        """The request that is being handled was given an answer that there was already."""
        call = current()
        self._note(
            Entry(
                at=self._wall(),
                request_id=call.request_id if call is not None else "",
                caller=str(current_caller() or ""),
                model=model[:_NAME_MAX],
                where=Where.CACHED,
                completed=True,
                output_tokens=tokens,
                avoided=self._baseline or 0,
            )
        )

    def _note(self, entry: Entry) -> None:
        self._entries.append(entry)
        if self._writing is None:
            self._writing = asyncio.get_running_loop().call_later(_GATHERED_S, self._write_soon)

    def _write_soon(self) -> None:
        self._writing = None
        self._thread.later(self._write)

    # --- what is asked about it -------------------------------------------------------------------------------------

    async def report(self, asked: Asked) -> Report:
        """What a caller, or an admin of everybody, wants to know. Raises UnavailableError where the ledger can't be
        read."""
        now = self._wall()
        today = day_of(now)
        since = month_of(today) if asked.days is None else today - asked.days
        caller = reader_of(current_caller()) or None

        def read(file: LedgerFile) -> Report:
            self._write(file)
            return Report(
                grouping=asked.grouping,
                now=now,
                lines=file.lines(asked.grouping, since=since, caller=caller),
                books=file.books(now),
                limits=self._limits,
                baseline=self._baseline,
                unpriced=self._unpriced(),
                ledger=file.ledger_id,
                latest=file.latest(asked.latest, caller=caller),
            )

        try:
            report = await self._thread.run(read)
        except (OSError, sqlite3.Error) as error:
            raise UnavailableError(f"the cost ledger can't be read: {error}; see to costs.file") from error
        self._books = report.books
        return report

    def _unpriced(self) -> tuple[str, ...]:
        directory = self._live.directory
        models = {
            status.artifact.family
            for entry in directory.entries.values()
            for status in entry.record.runner.models
            if is_external(entry.record, status) and price_of(self._prices, status.artifact) is None
        }
        return tuple(sorted(models))

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            with suppress(OSError, sqlite3.Error):
                self._books = await self._thread.run(lambda file: file.books(self._wall()))

    # --- on the thread ----------------------------------------------------------------------------------------------

    def _open(self) -> LedgerFile:
        settings = self._settings
        return LedgerFile(
            settings.file,
            owner=self._name,
            keep_days=settings.keep_days,
            max_requests=settings.max_requests,
            now=self._wall(),
        )

    def _write(self, file: LedgerFile) -> None:
        entries: list[Entry] = []
        with suppress(IndexError):
            while True:
                entries.append(self._entries.popleft())
        try:
            file.note(entries)
        except sqlite3.Error as error:
            _log.error("costs.ledger_failed", why=str(error)[:200], lost_requests=len(entries))


def _is_refusal(error: ChorusError) -> bool:
    """Whether a provider that had sent nothing yet said no, rather than being left or lost while it may have read."""
    return error.metadata.keys().isdisjoint((LOST, UPSTREAM_LOST)) and not isinstance(error, DeadlineExceededError)
