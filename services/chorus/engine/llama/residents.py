"""Acts on what `core.residency` decides: loads, admits, evicts and refuses, one thing at a time."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor

from chorus.core.errors import ChorusError, DrainingError, EngineError
from chorus.core.generation import Progress, Queued
from chorus.core.residency.allocation import Wish
from chorus.core.residency.devices import Machine
from chorus.core.residency.residents import Admit, Ask, Decision, Evict, Load, Nothing, Refuse, Residency, Rules
from chorus.engine.llama.host import Host
from chorus.engine.llama.settings import LlamaSettings
from chorus.engine.llama.sizing import wish_of
from chorus.telemetry.logs import get_logger

_log = get_logger()
_SHORTEST_WAIT_S = 0.001


class Visit:
    """One request's stay with a model: it waits until that is in memory, and then uses it until `end`.

    Read `events` to their end before the model is touched.
    """

    def __init__(self, residents: Residents, host: Host, context_length: int | None) -> None:
        self.host = host
        self.context_length = context_length
        self.ask: Ask | None = None  # while it waits
        self.inside = False
        self._residents = residents
        self._news: asyncio.Queue[Queued | Progress | ChorusError | None] = asyncio.Queue()
        self._position: int | None = None

    async def events(self) -> AsyncIterator[Queued | Progress]:
        """What is waited for, until the model can be used. Raises why it can't."""
        while not self.inside or not self._news.empty():
            news = await self._news.get()
            if isinstance(news, ChorusError):
                raise news
            if news is not None:
                yield news

    def end(self) -> None:
        """It is done, or does not want to wait any more. May be called twice."""
        self._residents.ended(self)

    def told(self, progress: Progress) -> None:
        """How far the load is."""
        self._news.put_nowait(progress)

    def waits_behind(self, position: int) -> None:
        """How many models have their turn first."""
        if position != self._position:
            self._position = position
            self._news.put_nowait(Queued(position))

    def admitted(self) -> None:
        """The model can be used."""
        self.ask, self.inside = None, True
        self._news.put_nowait(None)

    def refused(self, error: ChorusError) -> None:
        """It never can."""
        self.ask = None
        self._news.put_nowait(error)


class Residents:
    """The models of one engine that are in memory, and the requests that wait for one. Used on the event loop."""

    def __init__(
        self,
        settings: LlamaSettings,
        machine: Callable[[], Machine],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`machine` is read in the loader's thread before each decision. `clock` is steady, in seconds."""
        residency = settings.residency
        self._settings = settings
        self._machine = machine
        self._clock = clock
        self._book = Residency(
            Rules(
                max_loaded=residency.max_loaded,
                keep_alive_s=residency.keep_alive_s,
                longest_hold_s=residency.longest_hold_s,
            )
        )
        self._hosts: dict[str, Host] = {}
        self._visits: dict[str, list[Visit]] = {}  # those who wait, by model
        self._loader: Executor | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._stopped = True

    def start(self, loader: Executor) -> None:
        """From now on requests are let in. `loader` runs one thing at a time."""
        self._loader = loader
        self._stopped = False
        self._keeper = asyncio.create_task(self._keep(), name="llama-residents")

    async def stop(self) -> None:
        """Refuses those who wait, unloads everything and ends."""
        self._stopped = True
        for name in list(self._visits):
            self._refuse(name, DrainingError("the engine is shutting down"))
        await asyncio.gather(*(host.unload(wait=False) for host in self._hosts.values()))
        self.look()
        if self._keeper is not None:
            await self._keeper

    def look(self) -> None:
        """Something may have changed: decides again."""
        self._news.set()

    # --- requests -----------------------------------------------------------------------------------------------------

    def visit(self, host: Host, context_length: int | None = None) -> Visit:
        """Begins a request's use of a model; the caller ends it whatever happens.

        Without a `context_length` it takes whatever the model is loaded with. Raises `DrainingError` where the model's
        owner has it unloaded, `InvalidRequestError` where it has, or is to have, another context than asked for.
        """
        if self._stopped:
            raise DrainingError("the engine is shutting down")
        if host.closing:
            raise DrainingError(f"{host.name} is being unloaded")
        ask = self._book.ask(self._wish(host, context_length), self._clock(), chosen=context_length is not None)
        visit = Visit(self, host, context_length)
        self._hosts[host.name] = host
        host.enter()
        if ask is None:
            visit.admitted()
            return visit
        visit.ask = ask
        self._visits.setdefault(host.name, []).append(visit)
        host.listen(visit.told)
        self.look()
        return visit

    def renewed(self, host: Host) -> None:
        """It has another source, and so do those who wait for it."""
        for visit in self._visits.get(host.name, ()):
            if visit.ask is not None:
                visit.ask.wish = self._wish(host, visit.context_length)

    def _wish(self, host: Host, context_length: int | None) -> Wish:
        return wish_of(host.source, self._settings, host.context_for(context_length))

    def ended(self, visit: Visit) -> None:
        """See `Visit.end`."""
        host = visit.host
        if visit.inside:
            visit.inside = False
            self._book.leave(host.name, self._clock())
            host.leave()
        elif visit.ask is not None:
            self._book.withdraw(visit.ask)
            self._visits[host.name].remove(visit)
            visit.ask = None
            self._go(visit)
        else:
            return
        if self._book.anybody_waits or self._settings.residency.keep_alive_s:
            self.look()

    async def unload(self, host: Host, *, wait: bool) -> None:
        """The owner wants it unloaded, pinned or not. Those who wait for it are refused; see `Engine.unload`."""
        self._refuse(host.name, DrainingError(f"{host.name} is being unloaded"))
        try:
            await host.unload(wait=wait, closes=lambda: self._book.leaving(host.name))
        finally:
            # Who asked may have gone meanwhile; the unloading ends without him, and nothing is loaded before it has.
            host.after_unloading(lambda: self._unloaded(host))

    def _unloaded(self, host: Host) -> None:
        if host.is_settled:
            self._book.gone(host.name)
        self.look()

    def failed(self, host: Host) -> None:
        """The model's owner thread died."""
        self._book.gone(host.name)
        self.look()

    # --- decisions ----------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while not self._stopped:
            self._news.clear()
            try:
                machine = await self._read()
                if not self._stopped:
                    decision = self._book.decide(self._clock(), machine)
                    self._tell_positions()
                    await self._carry_out(decision)
            except Exception as error:  # a defect: those who wait must not wait for ever, and the others go on
                _log.exception("the keeper of models failed")
                for name in list(self._visits):
                    self._refuse(name, EngineError(f"loading failed: {type(error).__name__}"))
                await self._pause(math.inf)

    async def _read(self) -> Machine:
        assert self._loader is not None
        return await asyncio.get_running_loop().run_in_executor(self._loader, self._machine)

    async def _carry_out(self, decision: Decision) -> None:
        match decision:
            case Load():
                await self._load(decision)
            case Evict(name, why):
                _log.info("model evicted", model=name, why=str(why))
                try:
                    await self._hosts[name].evict()
                finally:
                    self._book.gone(name)
            case Admit(name):
                self._admit(name)
            case Refuse(shortage, asks):
                error = shortage.error
                if not any(ask.chosen for ask in asks):  # a context that is too large says nothing of the usual one
                    self._hosts[shortage.model].fail(error)
                self._refuse(shortage.model, error, asks)
            case Nothing(until):
                await self._pause(until)

    async def _load(self, load: Load) -> None:
        name = load.model
        try:
            await self._hosts[name].load(load.allocation, load.context_length)
        except ChorusError as error:
            self._book.gone(name)
            self._refuse(name, error)
            return
        except BaseException:
            self._book.gone(name)
            raise
        if self._book.loaded(name, self._clock()):
            self._admit(name)

    async def _pause(self, until: float) -> None:
        """Until something happens, or that time."""
        timeout = None if math.isinf(until) else max(until - self._clock(), _SHORTEST_WAIT_S)
        try:
            async with asyncio.timeout(timeout):
                await self._news.wait()
        except TimeoutError:
            return

    def _admit(self, name: str) -> None:
        for visit in self._visits.pop(name, ()):
            visit.host.deafen(visit.told)
            visit.admitted()

    def _refuse(self, name: str, error: ChorusError, asks: tuple[Ask, ...] | None = None) -> None:
        """Refuses those who wait, or of them only those of `asks`, whom the book knows no more."""
        waiting = self._visits.pop(name, [])
        staying = [] if asks is None else [visit for visit in waiting if visit.ask not in asks]
        if staying:
            self._visits[name] = staying
        for visit in waiting:
            if visit in staying:
                continue
            if asks is None and visit.ask is not None:
                self._book.withdraw(visit.ask)
            self._go(visit)
            visit.refused(error)

    @staticmethod
    def _go(visit: Visit) -> None:
        visit.host.deafen(visit.told)
        visit.host.leave()

    def _tell_positions(self) -> None:
        for name, visits in self._visits.items():
            position = self._book.place_in_queue(name)
            if self._book.allocation(name) is None or position:
                for visit in visits:
                    visit.waits_behind(position)
