"""What may go wrong with a mesh of processes, one thing at a time, and its repair: for benchmarks that need both."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack

from meshes import Mesh, Shape
from processes import free_port

from chorus.testing.blackhole import Blackhole

FROZEN_S = 4.0
"""How long a process that is frozen, or cut off, stays so: longer than it takes to be noticed, and than its lease."""


class Ways:
    """The ways between each runner and the others, which can be cut: packets vanish, connections stay open."""

    def __init__(self) -> None:
        self._to: dict[str, Blackhole] = {}
        self._from: dict[tuple[str, str], Blackhole] = {}
        self._ports: dict[str, int] = {}

    async def lay(self, shape: Shape, stack: AsyncExitStack) -> Mapping[str, Mapping[str, str]]:
        """The settings of each runner by which all goes through them; they end with `stack`."""
        own: dict[str, Mapping[str, str]] = {}
        for runner in shape.runners:
            way = self._to[runner] = await stack.enter_async_context(Blackhole())
            way.leads_to = self._ports[runner] = free_port()
            registries = []
            for registry in shape.registries:
                there = self._from[runner, registry] = await stack.enter_async_context(Blackhole())
                registries.append(f"{registry}@127.0.0.1:{there.port}")
            own[runner] = {
                "CHORUS_RUNNER__LISTEN": f"127.0.0.1:{way.leads_to}",
                "CHORUS_RUNNER__ADVERTISE": f"127.0.0.1:{way.port}",
                "CHORUS_RUNNER__REGISTRIES": ",".join(registries),
            }
        return own

    def lead(self, mesh: Mesh) -> None:
        """Leads the runners to the registries of this mesh."""
        for (_, registry), way in self._from.items():
            way.leads_to = mesh.port(registry)

    def cut(self, runner: str) -> None:
        """Nothing passes between this runner and anybody."""
        for way in self._of(runner):
            way.shut()

    def mend(self, runner: str) -> None:
        """All passes again, what was held back first."""
        for way in self._of(runner):
            way.open()

    def _of(self, runner: str) -> list[Blackhole]:
        return [self._to[runner], *(way for (end, _), way in self._from.items() if end == runner)]


class Faults:
    """Faults of a mesh, each of which returns whom it hit, once it is repaired. `busy` tells who has streams now."""

    def __init__(self, mesh: Mesh, ways: Ways, busy: Callable[[], Counter[str]], draw: random.Random) -> None:
        self._mesh = mesh
        self._ways = ways
        self._busy = busy
        self._draw = draw

    @property
    def kinds(self) -> Mapping[str, Callable[[], Awaitable[str]]]:
        """Every fault by its name."""
        return {
            "kill": self.kill,
            "freeze": self.freeze,
            "partition": self.partition,
            "coordinator": lambda: self._kill(self._mesh.shape.coordinators),
            "registry": lambda: self._kill(self._mesh.shape.registries),
        }

    async def kill(self) -> str:
        """A runner with streams is killed, and started again."""
        victim = self._runner()
        self._mesh.kill(victim)
        self._mesh.start(victim)
        return victim

    async def freeze(self) -> str:
        """A runner with streams stands still, and goes on later."""
        victim = self._runner()
        self._mesh.freeze(victim)
        try:
            await asyncio.sleep(FROZEN_S)
        finally:
            self._mesh.thaw(victim)
        return victim

    async def partition(self) -> str:
        """A runner with streams is cut off from everybody, and connected again."""
        victim = self._runner()
        self._ways.cut(victim)
        try:
            await asyncio.sleep(FROZEN_S)
        finally:
            self._ways.mend(victim)
        return victim

    async def _kill(self, names: object) -> str:
        victim = self._draw.choice(sorted(names))  # type: ignore[call-overload]
        self._mesh.kill(victim)
        self._mesh.start(victim)
        return str(victim)

    def _runner(self) -> str:
        return self._draw.choice(sorted(self._busy()) or sorted(self._mesh.shape.runners))
