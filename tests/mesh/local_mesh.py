"""A registry and runners in this process, over mutual TLS on loopback, for tests of either."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

from chorus.api.registry.v1 import registry_pb2 as registry_pb
from chorus.api.registry.v1 import registry_pb2_grpc
from chorus.api.runner.v1 import runner_pb2_grpc
from chorus.config import ChorusConfig
from chorus.core.fleet.directory import Directory, DirectoryMerger
from chorus.core.fleet.events import DirectoryEvent
from chorus.core.fleet.records import RunnerRecord
from chorus.core.identity import Role
from chorus.hardware import Inventory
from chorus.registry.service import RegistryService
from chorus.runner.service import RunnerService
from chorus.testing.engine_fake import FakeEngine
from chorus.transport import open_channel
from chorus.wire.directory import decode_directory_event
from tests.mesh.conftest import TRUST_DOMAIN, Identities

FAST_REGISTRY = {"lease_ttl_s": 1.0, "heartbeat_interval_s": 0.1, "watch_flush_interval_s": 0.01}


class LocalMesh:
    """Starts services; all of them, and every channel, end with the test."""

    def __init__(self, identity_of: Identities, stack: AsyncExitStack) -> None:
        self.identity_of = identity_of
        self._stack = stack
        self._names: dict[RegistryService, str] = {}

    async def registry(self, name: str = "registry", listen: str = "127.0.0.1:0", **settings: Any) -> RegistryService:
        """A registry that is quick to notice."""
        config = ChorusConfig.model_validate(
            {
                "mesh": {"trust_domain": TRUST_DOMAIN},
                "registry": {"name": name, "listen": listen, **FAST_REGISTRY, **settings},
            }
        )
        service = RegistryService(config, identity=self.identity_of(Role.REGISTRY, name))
        self._names[service] = name
        self._stack.push_async_callback(service.stop)
        await service.start()
        return service

    async def runner(
        self,
        *registries: str,
        name: str = "r1",
        engine: FakeEngine | None = None,
        models: tuple[str, ...] = (),
        inventory: Inventory | None = None,
        service: dict[str, Any] | None = None,
        **settings: Any,
    ) -> RunnerService:
        """A runner with a fake engine; `registries` as configured, `NAME@HOST:PORT`."""
        config = ChorusConfig.model_validate(
            {
                "mesh": {"trust_domain": TRUST_DOMAIN},
                "runner": {"listen": "127.0.0.1:0", "registries": list(registries) or ["127.0.0.1:1"], **settings},
            }
        )
        made = RunnerService(
            config,
            identity=self.identity_of(Role.RUNNER, name),
            engine=engine if engine is not None else FakeEngine(),
            inventory=inventory if inventory is not None else Inventory("test-node"),
            name=name,
            models=models,
            **(service or {}),
        )
        self._stack.push_async_callback(made.stop, 0.0)
        await made.start()
        return made

    async def channel(self, address: str, server: Role, server_name: str, role: Role, name: str) -> Any:
        """A channel to a service, as the holder of (role, name)."""
        channel = open_channel(
            address, identity=self.identity_of(role, name), server=self.identity_of(server, server_name).spiffe_id
        )
        return await self._stack.enter_async_context(channel)

    async def registry_stub(self, service: RegistryService, role: Role, name: str) -> Any:
        """A registry as (role, name) sees it."""
        channel = await self.channel(service.address, Role.REGISTRY, self._names[service], role, name)
        return registry_pb2_grpc.RegistryStub(channel)

    async def runner_stub(self, service: RunnerService, role: Role = Role.COORDINATOR, name: str = "c") -> Any:
        """A runner as (role, name) sees it."""
        channel = await self.channel(service.address, Role.RUNNER, service.presence.runner_id, role, name)
        return runner_pb2_grpc.ModelRunnerStub(channel)

    async def watch(self, service: RegistryService, **request: Any) -> AsyncIterator[DirectoryEvent]:
        """The events of one watch."""
        stub = await self.registry_stub(service, Role.COORDINATOR, "c")
        async for response in stub.WatchNodes(registry_pb.WatchNodesRequest(**request)):
            yield decode_directory_event(response.event)

    async def record(
        self, service: RegistryService, runner_id: str, condition: Callable[[RunnerRecord], bool]
    ) -> RunnerRecord:
        """Waits until the registry holds a record of the runner that meets the condition, and returns it."""
        seen = Seen()
        async for event in self.watch(service):
            entry = seen.apply("", event).get(runner_id)
            if entry is not None and condition(entry.record):
                return entry.record
        raise AssertionError("the watch ended")

    async def gone(self, service: RegistryService, runner_id: str) -> None:
        """Waits until the registry no longer lists the runner."""
        seen = Seen()
        async for event in self.watch(service):
            if runner_id not in seen.apply("", event).entries:
                return


class Seen:
    """What a coordinator would know, with the versions that each runner went through."""

    def __init__(self) -> None:
        self.merger = DirectoryMerger()
        self.history: list[Directory] = []

    def apply(self, registry: str, event: DirectoryEvent) -> Directory:
        """Takes in an event."""
        directory = self.merger.apply(registry, event, asyncio.get_running_loop().time())
        self.history.append(directory)
        return directory

    def lost(self, registry: str) -> None:
        """Notes the end of a stream."""
        self.history.append(self.merger.registry_lost(registry, asyncio.get_running_loop().time()))
