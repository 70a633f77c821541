"""A runner in the directory that answers with whatever bytes a test gives it, over real TLS."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.api.runner.v1 import runner_pb2, runner_pb2_grpc
from chorus.core.fleet.records import Cpu, EngineInfo, EngineKind, Load, Node, Runner, RunnerRecord, RunnerState
from chorus.core.identity import Role
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.transport import MeshServer, Service, build_server, open_channel
from chorus.wire.resources import encode_runner_record

Generate = Callable[[runner_pb2.GenerateRequest, Any], Awaitable[None]]


class ScriptedRunner(runner_pb2_grpc.ModelRunnerServicer):
    """Serves `Generate` by calling `script`, which writes bytes to the context; keeps the requests that it got."""

    def __init__(self, script: Generate) -> None:
        self.script = script
        self.requests: list[runner_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.ended = asyncio.Event()
        self._server: MeshServer | None = None

    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: runner_pb2.GenerateRequest, context: Any
    ) -> None:
        """Runs the script."""
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            await self.script(request, context)
        finally:
            self.ended.set()

    async def join(self, mesh: InProcessMesh, name: str = "scripted", *, identity: str = "") -> None:
        """Serves and registers; the registry's leases must be long, as nothing renews this one.

        `identity` names another certificate than that of the runner it claims to be.
        """
        me = mesh.certificates.identity(Role.RUNNER, name)
        self._server = build_server(
            identity=mesh.certificates.identity(Role.RUNNER, identity) if identity else me,
            listen=["127.0.0.1:0"],
            services=[
                Service(
                    runner_pb2.DESCRIPTOR.services_by_name["ModelRunner"],
                    runner_pb2_grpc.add_ModelRunnerServicer_to_server,
                    self,
                )
            ],
        )
        await self._server.start()
        runner = Runner(
            runner_id=name,
            incarnation=1,
            node_id="node",
            address=self._server.addresses[0],
            server_name=me.spiffe_id.dns_name,
            version="99",
            engines=(EngineInfo("fake", "1", EngineKind.LOCAL),),
            models=FakeEngine().models(),
        )
        node = Node("node", "node", "Linux", Cpu("cpu", 1, 1), 8 << 30, 8 << 30)
        record = RunnerRecord(runner, node, RunnerState.READY, Load(), 1)
        registry = mesh.registries[0]
        server = mesh.certificates.id(Role.REGISTRY, "registry-1")
        async with open_channel(registry.address, identity=me, server=server) as channel:
            stub: Any = registry_pb2_grpc.RegistryStub(channel)
            await stub.Register(registry_pb2.RegisterRequest(record=encode_runner_record(record)))
        await mesh.until(lambda directory: directory.get(name) is not None)

    async def leave(self) -> None:
        """Stops serving."""
        if self._server is not None:
            await self._server.stop(0)
