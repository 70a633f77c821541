"""Telling watchers of this coordinator's directory: a snapshot, what changed since, or that nothing did."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from chorus.coordinator.live import LiveDirectory
from chorus.core.errors import DrainingError
from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.events import (
    BookmarkEvent,
    DeltaEvent,
    DirectoryEvent,
    LeasedRecord,
    Removal,
    RemovalReason,
    SnapshotEvent,
)
from chorus.core.fleet.records import Load, RunnerRecord

BOOKMARK_INTERVAL_S = 0.8
"""Watchers may count on something every second; the rest is for the way."""

FLUSH_INTERVAL_S = 0.1
"""For so long changes are gathered after one has been told of."""


def event_between(
    told: Directory | None, now_directory: Directory, *, epoch: int, now: float, without_load: bool
) -> DirectoryEvent:
    """The event that turns what a watcher was told (nothing: None) into the present directory."""
    stamp = (epoch, now_directory.version, now_directory.synced)
    if told is None:
        return SnapshotEvent(*stamp, now_directory.leased(now))
    change = now_directory.changes_since(told)
    upserts = tuple(
        LeasedRecord(entry.record, max(0.0, now - entry.heard_at))
        for entry in change.upserts
        if not (without_load and _only_load_changed(told.get(entry.record.runner.runner_id), entry))
    )
    # A coordinator merges what several registries say, and does not know each one's reason.
    removals = tuple(
        Removal(record.runner.runner_id, record.runner.incarnation, RemovalReason.EXPIRED) for record in change.removed
    )
    if not upserts and not removals:
        return BookmarkEvent(*stamp)
    return DeltaEvent(*stamp, upserts, removals)


def _only_load_changed(before: DirectoryEntry | None, after: DirectoryEntry) -> bool:
    if before is None:
        return False
    return _lasting(before.record) == _lasting(after.record)


def _lasting(record: RunnerRecord) -> RunnerRecord:
    """A record without what every heartbeat changes, the free memory and the GPUs of its machine included."""
    node = replace(record.node, memory_available_bytes=0, gpus=())
    return replace(record, node=node, load=Load(), sequence=0)


class Watching:
    """The watches of a coordinator. `epoch` tells this life of it from the ones before."""

    def __init__(self, live: LiveDirectory, epoch: int) -> None:
        self._live = live
        self.epoch = epoch
        self._closed = asyncio.Event()

    def close(self) -> None:
        """Ends every watch."""
        self._closed.set()

    async def events(self, *, without_load: bool) -> AsyncIterator[DirectoryEvent]:
        """Yields one watch's events. Raises DrainingError when the coordinator stops."""
        told: Directory | None = None
        told_at = self._live.now
        while not self._closed.is_set():
            seen, now = self._live.directory, self._live.now
            event = event_between(told, seen, epoch=self.epoch, now=now, without_load=without_load)
            due_in_s = told_at + BOOKMARK_INTERVAL_S - now
            if due_in_s <= 0 or not isinstance(event, BookmarkEvent):
                yield event
                told, told_at, due_in_s = seen, now, BOOKMARK_INTERVAL_S
            # The first change goes out at once; those that follow closely are gathered.
            await self._pause(min(FLUSH_INTERVAL_S, due_in_s))
            await self._news(seen, due_in_s - FLUSH_INTERVAL_S)
        raise DrainingError("this coordinator is stopping; watch another one, or this one again")

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            return

    async def _news(self, than: Directory, timeout_s: float) -> None:
        """Returns when the directory is newer, the watches end, or after `timeout_s`."""
        newer = asyncio.ensure_future(self._live.wait_newer(than))
        closed = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait({newer, closed}, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
        finally:
            newer.cancel()
            closed.cancel()
