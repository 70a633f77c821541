"""The directory of a running coordinator: merged from its registries, swapped at every change, and watched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from chorus.core.fleet.directory import Directory, DirectoryChange, DirectoryMerger, RegistryView
from chorus.core.fleet.events import DirectoryEvent
from chorus.telemetry.logs import get_logger

_log = get_logger()

Listener = Callable[[DirectoryChange], None]


class LiveDirectory:
    """A DirectoryMerger with a clock, listeners and waiters. Used from one event loop; `clock` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._merger = DirectoryMerger()
        self._clock = clock
        self._listeners: list[Listener] = []
        self._changed = asyncio.Event()  # replaced at every change: whoever has the old one is woken
        self._seen = self._merger.directory

    @property
    def directory(self) -> Directory:
        """The directory now."""
        return self._seen

    @property
    def now(self) -> float:
        """The clock by which the directory's entries were heard."""
        return self._clock()

    @property
    def clock(self) -> Callable[[], float]:
        """The same, for who looks at it with every message."""
        return self._clock

    def registries(self) -> tuple[RegistryView, ...]:
        """How we stand with each registry that has told us something."""
        return self._merger.registries()

    @property
    def told(self) -> bool:
        """Whether who is absent may be called so: somebody is there, or a registry is sure that nobody is."""
        return bool(self._seen.entries) or self._seen.synced

    async def wait_told(self, timeout_s: float, left_s: float | None = None) -> None:
        """Returns once it is `told`, or after `timeout_s`, or `left_s` where that is less: a coordinator or a registry
        that was just started knows of nobody, and must not say that nobody is."""
        if self.told:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s if left_s is None else min(left_s, timeout_s)):
                await self.wait_until(lambda _: self.told)

    def on_change(self, listener: Listener) -> None:
        """Has `listener` told of every change, when `directory` is the new one already. It must not raise."""
        self._listeners.append(listener)

    # --- what happens -----------------------------------------------------------------------------------------------

    def apply(self, registry: str, event: DirectoryEvent) -> None:
        """Takes in a registry's event. Raises as `DirectoryMerger.apply`."""
        self._swap(self._merger.apply(registry, event, self._clock()))

    def registry_lost(self, registry: str) -> None:
        """The stream of a registry has ended."""
        self._swap(self._merger.registry_lost(registry, self._clock()))

    def runner_lost(self, runner_id: str, incarnation: int) -> None:
        """The connection to a runner broke."""
        self._swap(self._merger.mark_unreachable(runner_id, incarnation, self._clock()))

    def runner_found(self, runner_id: str) -> None:
        """A runner answers."""
        self._swap(self._merger.mark_reachable(runner_id, self._clock()))

    # --- waiting ----------------------------------------------------------------------------------------------------

    async def wait_newer(self, than: Directory) -> Directory:
        """Returns once the directory is another one than `than`."""
        while self._seen is than:
            await self._changed.wait()
        return self._seen

    async def wait_until(self, condition: Callable[[Directory], bool]) -> Directory:
        """Returns once `condition` holds of the directory."""
        while not condition(self._seen):
            await self._changed.wait()
        return self._seen

    def _swap(self, directory: Directory) -> None:
        before = self._seen
        if directory is before:
            return
        self._seen = directory
        change = directory.changes_since(before)
        for entry in change.upserts:
            runner = entry.record.runner
            known = before.get(runner.runner_id)
            if known is None or known.record.runner.incarnation != runner.incarnation:
                _log.info(
                    "runner.joined",
                    runner_id=runner.runner_id,
                    incarnation=runner.incarnation,
                    node_id=runner.node_id,
                    address=runner.address,
                    models=[status.artifact.name for status in runner.models],
                )
            elif known.record.state is not entry.record.state:
                _log.info("runner.state", runner_id=runner.runner_id, state=entry.record.state)
        for record in change.removed:
            _log.info("runner.left", runner_id=record.runner.runner_id, incarnation=record.runner.incarnation)
        for listener in self._listeners:
            listener(change)
        self._changed.set()
        self._changed = asyncio.Event()
