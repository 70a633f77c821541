"""The leases of a running registry: the table with a clock, a sweep, and watchers that wait for news."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

from chorus.core.errors import DrainingError
from chorus.core.fleet.claims import Claim, NodeClaims
from chorus.core.fleet.events import DirectoryEvent, Removal, RemovalReason
from chorus.core.fleet.leases import LeaseTable, Watcher
from chorus.core.fleet.records import Load, RunnerRecord, RunnerState
from chorus.telemetry.lease_metrics import LeaseMetrics
from chorus.telemetry.logs import get_logger

BOOKMARK_INTERVAL_S = 0.8
"""Watchers may count on something every second; the rest is for the way."""

_SWEEP_INTERVAL_S = 0.1

_log = get_logger()


class LeaseBoard:
    """Leases on one event loop. `sweep` must run for as long as it is used; `clock` is monotonic, in seconds."""

    def __init__(
        self,
        *,
        epoch: int,
        ttl_s: float,
        flush_interval_s: float,
        clock: Callable[[], float],
        metrics: LeaseMetrics,
        claims: NodeClaims = NodeClaims.FIRST,
    ) -> None:
        self.table = LeaseTable(epoch=epoch, ttl_s=ttl_s, now=clock(), claims=claims)
        self._flush_interval_s = flush_interval_s
        self._clock = clock
        self._metrics = metrics
        self._changed = asyncio.Event()  # cleared by whoever is about to wait, having looked
        self._closing = asyncio.Event()
        self._limits: set[asyncio.Timeout] = set()  # of what goes on for as long as the board is open
        self._nodes: dict[str, str] = {}  # of each runner, for the log

    @property
    def now(self) -> float:
        """The board's clock."""
        return self._clock()

    def register(self, record: RunnerRecord, claim: Claim = Claim()) -> None:  # noqa: B008 - immutable
        """Grants or renews a lease. Raises as `LeaseTable.register`."""
        runner = record.runner
        before = self.table.incarnation_of(runner.runner_id)
        changed = self.table.register(record, self.now, claim)
        self._nodes[runner.runner_id] = record.node.node_id
        self._heard(runner.runner_id, changed=changed)
        if before != runner.incarnation:
            if before is None:
                self._metrics.registered()
            _log.info(
                "runner.registered",
                runner_id=runner.runner_id,
                incarnation=runner.incarnation,
                replaced_incarnation=before,
                node_id=record.node.node_id,
                address=runner.address,
            )

    def heartbeat(self, runner_id: str, incarnation: int, sequence: int, state: RunnerState, load: Load) -> None:
        """Renews a lease. Raises as `LeaseTable.heartbeat`."""
        changed = self.table.heartbeat(runner_id, incarnation, sequence, state, load, self.now)
        self._heard(runner_id, changed=changed)

    def deregister(self, runner_id: str, incarnation: int | None) -> None:
        """Ends a lease, if there is one."""
        removal = self.table.deregister(runner_id, incarnation)
        if removal is not None:
            self._gone(removal)
            self._wake()

    async def sweep(self) -> None:
        """Removes lapsed leases several times in a TTL, until cancelled."""
        interval_s = min(_SWEEP_INTERVAL_S, self.table.ttl_s / 20)
        while True:
            await asyncio.sleep(interval_s)
            synced = self.table.synced
            removals = self.table.expire(self.now)
            for removal in removals:
                self._gone(removal)
            if removals or self.table.synced != synced:
                self._wake()

    async def watch(self, *, without_load: bool) -> AsyncGenerator[DirectoryEvent, None]:
        """Yields the events of one watch, never two within the flush interval unless nothing gathers in it.

        Raises DrainingError when the board closes.
        """
        watcher = self.table.watch(without_load=without_load)
        try:
            while not self._closing.is_set():
                yield watcher.take(self.now)
                told_at = self.now
                await self._news(watcher, BOOKMARK_INTERVAL_S)
                # The first change goes out at once; those that follow closely are gathered, and wake nobody.
                await self._pause(told_at + self._flush_interval_s - self.now)
        finally:
            self.table.unwatch(watcher)
        raise _draining()

    @asynccontextmanager
    async def while_open(self) -> AsyncIterator[None]:
        """Has the block end, with DrainingError, when the board closes; nothing is waited for beside its own work."""
        limit = asyncio.timeout(0 if self._closing.is_set() else None)
        try:
            async with limit:
                self._limits.add(limit)
                yield
        except TimeoutError:
            if limit.expired():
                raise _draining() from None
            raise
        finally:
            self._limits.discard(limit)

    def close(self) -> None:
        """Ends every watch, and whatever goes on `while_open`."""
        self._closing.set()
        self._wake()
        for limit in self._limits:
            limit.reschedule(0)

    # --- inside -----------------------------------------------------------------------------------------------------

    async def _news(self, watcher: Watcher, timeout_s: float) -> None:
        """Returns once there is something to tell, or the board has closed, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (self._closing.is_set() or watcher.pending):
                    # Whoever waits already is woken by the next change all the same.
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return

    async def _pause(self, seconds: float) -> None:
        """Returns after that time, or once the board has closed."""
        if seconds <= 0:
            return
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return

    def _heard(self, runner_id: str, *, changed: bool) -> None:
        self._metrics.heard(runner_id, self.table.state_of(runner_id), self.now)
        if changed:
            self._wake()

    def _gone(self, removal: Removal) -> None:
        expired = removal.reason is RemovalReason.EXPIRED
        self._metrics.gone(removal.runner_id, expired=expired)
        tell = _log.warning if expired else _log.info
        tell(
            f"runner.{removal.reason}",
            runner_id=removal.runner_id,
            incarnation=removal.incarnation,
            node_id=self._nodes.pop(removal.runner_id),
        )

    def _wake(self) -> None:
        self._changed.set()


def _draining() -> DrainingError:
    return DrainingError("this registry is stopping; ask another one, or this one again")
