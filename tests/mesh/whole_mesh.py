"""A whole mesh in a thread of its own, for tests that call it synchronously, by raw bytes and by any method's name."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.api.identity.v1 import identity_pb2
from chorus.api.registry.v1 import registry_pb2
from chorus.api.runner.v1 import runner_pb2
from chorus.config import ChorusConfig
from chorus.core.identity import Role, SpiffeId
from chorus.identity.service import IdentityService
from chorus.testing.certificates import MeshCertificates
from chorus.testing.mesh import InProcessMesh
from chorus.transport import TlsIdentity, open_sync_channel

SERVICES: Mapping[str, ServiceDescriptor] = {
    "registry": registry_pb2.DESCRIPTOR.services_by_name["Registry"],
    "runner": runner_pb2.DESCRIPTOR.services_by_name["ModelRunner"],
    "coordinator": coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"],
    "identity": identity_pb2.DESCRIPTOR.services_by_name["Identity"],
    "enrolment": identity_pb2.DESCRIPTOR.services_by_name["Enrolment"],
}


@dataclass(frozen=True)
class Server:
    """Where a service is, and who it is."""

    address: str
    spiffe_id: SpiffeId


class WholeMesh:
    """Servers by kind, and channels to them in any role."""

    def __init__(self, certificates: MeshCertificates, servers: Mapping[str, Server]) -> None:
        self._certificates = certificates
        self._servers = servers
        self._channels: dict[tuple[str, Role], grpc.Channel] = {}
        self._identities: dict[Role, TlsIdentity] = {}

    def channel(self, kind: str, role: Role) -> grpc.Channel:
        """A channel to the server of that kind, by a caller of that role."""
        if role not in self._identities:
            self._identities[role] = self._certificates.identity(role, "walker")
        if (kind, role) not in self._channels:
            server = self._servers[kind]
            self._channels[kind, role] = open_sync_channel(
                server.address, identity=self._identities[role], server=server.spiffe_id
            )
        return self._channels[kind, role]

    def call(
        self, kind: str, role: Role, method: str, raw: bytes, *, streams: bool, timeout_s: float = 5.0
    ) -> tuple[bytes, grpc.RpcError | None]:
        """Calls a method with raw bytes; returns its (first) message and the error that it ended with, if any."""
        channel = self.channel(kind, role)
        if not streams:
            try:
                return channel.unary_unary(method)(raw, timeout=timeout_s), None
            except grpc.RpcError as error:
                return b"", error
        call = channel.unary_stream(method)(raw, timeout=timeout_s)
        try:
            return next(call), None
        except StopIteration:
            return b"", None
        except grpc.RpcError as error:
            return b"", error
        finally:
            call.cancel()

    def close(self) -> None:
        """Closes every channel."""
        for channel in self._channels.values():
            channel.close()


def path(method: MethodDescriptor) -> str:
    """The method's name on the wire."""
    return f"/{method.containing_service.full_name}/{method.name}"


@asynccontextmanager
async def _identity_service(certificates: MeshCertificates) -> AsyncIterator[IdentityService]:
    with tempfile.TemporaryDirectory() as folder:
        certificates.authority.write(Path(folder))
        config = ChorusConfig.model_validate(
            {
                "mesh": {"certs_dir": folder},
                "identity": {"listen": "127.0.0.1:0", "join_listen": "127.0.0.1:0", "joins_per_minute": 6000},
            }
        )
        service = IdentityService(config)
        await service.start()
        try:
            yield service
        finally:
            await service.stop()


@contextmanager
def running(certificates: MeshCertificates, **settings: Any) -> Iterator[WholeMesh]:
    """A mesh that runs until the block is left."""
    ready = threading.Event()
    found: dict[str, Any] = {}

    async def serve() -> None:
        done = found["done"] = asyncio.Event()
        found["loop"] = asyncio.get_running_loop()
        async with (
            InProcessMesh(certificates=certificates, **settings) as mesh,
            _identity_service(certificates) as identity,
        ):
            found["servers"] = {
                "registry": Server(mesh.registries[0].address, certificates.id(Role.REGISTRY, "registry-1")),
                "runner": Server(mesh.runners[0].address, certificates.id(Role.RUNNER, "runner-1")),
                "coordinator": Server(mesh.coordinators[0].address, certificates.id(Role.COORDINATOR, "coordinator-1")),
                "identity": Server(identity.address, certificates.id(Role.IDENTITY, "identity")),
                "enrolment": Server(identity.join_address, certificates.id(Role.IDENTITY, "identity")),
            }
            ready.set()
            await done.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="whole-mesh")
    thread.start()
    ready.wait()
    mesh = WholeMesh(certificates, found["servers"])
    try:
        yield mesh
    finally:
        mesh.close()
        found["loop"].call_soon_threadsafe(found["done"].set)
        thread.join()
