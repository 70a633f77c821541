"""Watching registries that misbehave: silent ones, confused ones, and names that lead nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.config import Endpoint
from chorus.coordinator.live import LiveDirectory
from chorus.coordinator.registries import Registries, RegistryHealth, RegistryWatch
from chorus.core.errors import ConfigError
from chorus.core.fleet.events import BookmarkEvent, DeltaEvent, DirectoryEvent, LeasedRecord, SnapshotEvent
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.transport import Service, build_server
from chorus.wire.directory import encode_directory_event
from tests.core.fleet_records import record

Script = Callable[[int], AsyncIterator[DirectoryEvent]]

SNAPSHOT = SnapshotEvent(1, 1, True, (LeasedRecord(record("r")),))


class ScriptedRegistry(registry_pb2_grpc.RegistryServicer):
    """Answers the nth watch (from 1) with the script's events; nobody else is answered."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.watches = 0
        self._begun = asyncio.Condition()

    async def WatchNodes(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Runs the script."""
        async with self._begun:
            self.watches += 1
            number = self.watches
            self._begun.notify_all()
        async for event in self._script(number):
            yield registry_pb2.WatchNodesResponse(event=encode_directory_event(event))

    async def watched(self, times: int) -> None:
        """Waits until so many watches have begun."""
        async with self._begun:
            await self._begun.wait_for(lambda: self.watches >= times)


@asynccontextmanager
async def serving(certificates: MeshCertificates, registry: ScriptedRegistry) -> AsyncIterator[Endpoint]:
    service = Service(
        registry_pb2.DESCRIPTOR.services_by_name["Registry"], registry_pb2_grpc.add_RegistryServicer_to_server, registry
    )
    server = build_server(
        identity=certificates.identity(Role.REGISTRY, "registry"), listen=["127.0.0.1:0"], services=[service]
    )
    await server.start()
    yield Endpoint.parse(server.addresses[0]).named("registry")
    await server.stop(0)


@asynccontextmanager
async def watching(
    certificates: MeshCertificates, endpoint: Endpoint, *, silence_s: float = 3.0
) -> AsyncIterator[tuple[LiveDirectory, Callable[[], RegistryHealth]]]:
    live = LiveDirectory(asyncio.get_running_loop().time)
    watch = RegistryWatch(
        endpoint,
        directory=live,
        identity=certificates.identity(Role.COORDINATOR, "c"),
        insecure_loopback=False,
        silence_s=silence_s,
    )
    task = asyncio.create_task(watch.run())
    yield live, watch.health
    task.cancel()
    await asyncio.wait({task})
    assert not live.directory.synced


async def hanging() -> None:
    await asyncio.get_running_loop().create_future()


async def test_a_registry_that_falls_silent_is_watched_anew(certificates: MeshCertificates) -> None:
    async def script(number: int) -> AsyncIterator[DirectoryEvent]:
        yield SNAPSHOT
        if number < 3:
            await hanging()
        while True:
            yield BookmarkEvent(1, 1, True)
            await asyncio.sleep(0.05)

    registry = ScriptedRegistry(script)
    async with (
        serving(certificates, registry) as endpoint,
        watching(certificates, endpoint, silence_s=0.3) as (live, health),
    ):
        await live.wait_until(lambda directory: "r" in directory.entries)
        await live.wait_until(lambda directory: not directory.synced)
        assert "said nothing for 0.3 s" in health().problem
        assert "r" in live.directory.entries
        await registry.watched(3)
        await live.wait_until(lambda directory: directory.synced)
        assert (health().connected, health().problem) == (True, "")


async def test_a_registry_that_breaks_the_contract_is_watched_anew(certificates: MeshCertificates) -> None:
    async def script(number: int) -> AsyncIterator[DirectoryEvent]:
        if number == 1:
            yield DeltaEvent(1, 1, True)
        yield SNAPSHOT
        await hanging()

    registry = ScriptedRegistry(script)
    async with serving(certificates, registry) as endpoint, watching(certificates, endpoint) as (live, _):
        await live.wait_until(lambda directory: "r" in directory.entries)
        assert registry.watches == 2


async def test_a_registry_that_ends_its_watch_is_watched_anew(certificates: MeshCertificates) -> None:
    async def script(number: int) -> AsyncIterator[DirectoryEvent]:
        yield SNAPSHOT
        if number == 2:
            await hanging()

    registry = ScriptedRegistry(script)
    async with serving(certificates, registry) as endpoint, watching(certificates, endpoint):
        await registry.watched(2)


async def test_a_runner_is_no_registry(certificates: MeshCertificates) -> None:
    async def script(_number: int) -> AsyncIterator[DirectoryEvent]:
        yield SNAPSHOT

    registry = ScriptedRegistry(script)
    async with serving(certificates, registry) as endpoint:
        # Whoever answers there has the certificate of another registry than the configured one.
        other = Endpoint(endpoint.host, endpoint.port, "main")
        live = Noting(asyncio.get_running_loop().time)
        watch = RegistryWatch(
            other, directory=live, identity=certificates.identity(Role.COORDINATOR, "c"), insecure_loopback=False
        )
        task = asyncio.create_task(watch.run())
        await live.lost.wait()
        assert "another identity" in watch.health().problem
        assert registry.watches == 0
        task.cancel()
        await asyncio.wait({task})


class Noting(LiveDirectory):
    """Says when a registry was given up for the first time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.lost = asyncio.Event()

    def registry_lost(self, registry: str) -> None:
        """Sets `lost`."""
        super().registry_lost(registry)
        self.lost.set()


class LookedUp(Registries):
    """Says when a name has led nowhere."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unresolved = asyncio.Event()

    async def _look_up(self, endpoint: Endpoint) -> None:
        await super()._look_up(endpoint)
        if self._unresolved:
            self.unresolved.set()


async def test_names_are_looked_up_and_those_that_lead_nowhere_listed(certificates: MeshCertificates) -> None:
    async def script(_number: int) -> AsyncIterator[DirectoryEvent]:
        yield SNAPSHOT
        await hanging()

    registry = ScriptedRegistry(script)
    async with serving(certificates, registry) as endpoint:
        live = LiveDirectory(asyncio.get_running_loop().time)
        registries = LookedUp(
            [Endpoint("localhost", endpoint.port, "registry"), Endpoint("nobody.invalid", 7101, "registry")],
            directory=live,
            identity=certificates.identity(Role.COORDINATOR, "c"),
            insecure_loopback=False,
        )
        task = asyncio.create_task(registries.run())
        await live.wait_until(lambda directory: "r" in directory.entries)
        await registries.unresolved.wait()  # a resolver takes its time to find nothing
        found = {health.address: health for health in registries.health()}
        assert found[f"registry@127.0.0.1:{endpoint.port}"].connected
        assert "cannot be resolved" in found["registry@nobody.invalid:7101"].problem
        task.cancel()
        await asyncio.wait({task})


async def test_a_registry_that_may_not_be_dialled_ends_the_watching() -> None:
    registries = Registries(
        [Endpoint("192.0.2.1", 7101, "registry")],
        directory=LiveDirectory(asyncio.get_running_loop().time),
        identity=None,
        insecure_loopback=True,
    )
    with pytest.raises(ExceptionGroup) as caught:
        await registries.run()
    assert caught.group_contains(ConfigError, match="loopback")
