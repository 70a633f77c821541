"""Somebody has copied the key of runner-1, and tries all that a mesh is worth: others' requests, the registry's view of
other nodes, the names of registry and coordinator, what admins may, and going on after it was revoked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from chorus.api.identity.v1 import identity_pb2, identity_pb2_grpc
from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.api.runner.v1 import resources_pb2, runner_pb2, runner_pb2_grpc
from chorus.core.errors import (
    InvalidRequestError,
    NodeTakenError,
    PermissionDeniedError,
    RevokedError,
    TicketGrantorError,
)
from chorus.core.fleet.records import RunnerRecord
from chorus.core.generation import GenerationRequest, TextPrompt
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.tickets import Ticket
from chorus.transport import TlsIdentity, build_server, open_channel
from chorus.transport.keeping import CertificateKeeper, certificate_request
from chorus.transport.tickets import TicketSigner
from chorus.wire.generation import encode_generation
from chorus.wire.resources import encode_runner_record
from chorus.wire.tickets import spec_sha256
from tests.identity.identity_mesh import DOMAIN, identity_mesh
from tests.mesh.tiny_registry import tiny_registry
from tests.mesh.whole_mesh import SERVICES, path
from tests.security.attackers import refusal
from tests.security.rotating_mesh import RotatingMesh

pytestmark = pytest.mark.asyncio(loop_scope="module")

# What a runner has to call, of itself alone, and what tells nothing of anybody's requests.
OPEN_TO_RUNNERS = {
    "registry": {"Register", "Heartbeat", "KeepLease", "Deregister"},
    "runner": {"GetNode"},
    "coordinator": set[str](),
    "identity": {"WatchRevocations"},
}


@dataclass
class Stolen:
    """The copied files in a folder of the thief's, and channels that show them."""

    mesh: RotatingMesh
    directory: Path
    identity: TlsIdentity
    stack: AsyncExitStack

    def record(self, runner_id: str) -> RunnerRecord:
        """A runner as the mesh knows it."""
        entry = self.mesh.live.directory.get(runner_id)
        assert entry is not None
        return entry.record

    async def channel(self, kind: str) -> Any:
        """A channel to a service of that kind; the runner is the other one."""
        at = {
            "registry": (self.mesh.registry, Role.REGISTRY, "registry"),
            "coordinator": (self.mesh.coordinator, Role.COORDINATOR, "coordinator"),
            "identity": (self.mesh.at.service.address, Role.IDENTITY, "identity"),
            "runner": (self.record("runner-2").runner.address, Role.RUNNER, "runner-2"),
        }
        address, role, name = at[kind]
        server = SpiffeId(DOMAIN, role, name)
        return await self.stack.enter_async_context(open_channel(address, identity=self.identity, server=server))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stolen(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stolen]:
    folder = tmp_path_factory.mktemp("stolen")
    async with AsyncExitStack() as stack, asyncio.timeout(120):
        at = await stack.enter_async_context(identity_mesh(folder / "certs"))
        mesh = RotatingMesh(at, folder, stack)
        await mesh.start(runners=2)
        real, copied = mesh.kept["runner-runner-1"], folder / "thief"
        copied.mkdir()
        for name, content in (("ca.crt", real.ca_pem), ("tls.crt", real.cert_pem), ("tls.key", real.key_pem)):
            (copied / name).write_bytes(content)
            (copied / name).chmod(0o600)
        yield Stolen(mesh, copied, TlsIdentity.load(copied), stack)


@pytest.mark.parametrize("kind", list(OPEN_TO_RUNNERS))
async def test_it_may_call_nothing_that_reads_requests_or_is_for_admins(stolen: Stolen, kind: str) -> None:
    channel, tried = await stolen.channel(kind), set[str]()
    for method in SERVICES[kind].methods:
        if method.name in OPEN_TO_RUNNERS[kind]:
            continue
        streams = channel.unary_stream if method.server_streaming else channel.unary_unary
        assert isinstance(await refusal(streams(path(method))(b"", timeout=20)), PermissionDeniedError), method.name
        tried.add(method.name)
    assert tried | OPEN_TO_RUNNERS[kind] == {method.name for method in SERVICES[kind].methods}


async def test_it_cannot_change_what_the_registry_tells_of_another_runner(stolen: Stolen) -> None:
    stub: Any = registry_pb2_grpc.RegistryStub(await stolen.channel("registry"))
    real = stolen.record("runner-2")
    newer = replace(real, runner=replace(real.runner, incarnation=real.runner.incarnation + 1, address="127.0.0.1:1"))
    beat = registry_pb2.HeartbeatRequest(runner_id="runner-2", incarnation=real.runner.incarnation, sequence=10**9)

    async def leases() -> AsyncIterator[registry_pb2.KeepLeaseRequest]:
        yield registry_pb2.KeepLeaseRequest(heartbeat=beat)

    for attack in (
        stub.Register(registry_pb2.RegisterRequest(record=encode_runner_record(newer))),
        stub.Heartbeat(beat),
        stub.KeepLease(leases()),
        stub.Deregister(registry_pb2.DeregisterRequest(runner_id="runner-2", incarnation=newer.runner.incarnation)),
    ):
        assert isinstance(await refusal(attack), PermissionDeniedError)
    own = stolen.record("runner-1")
    dialled = replace(own, runner=replace(own.runner, server_name=real.runner.server_name))
    register = stub.Register(registry_pb2.RegisterRequest(record=encode_runner_record(dialled)))
    assert isinstance(await refusal(register), PermissionDeniedError)
    assert stolen.record("runner-2").runner == real.runner


async def test_it_states_no_other_machine_than_its_own(stolen: Stolen) -> None:
    stub: Any = registry_pb2_grpc.RegistryStub(await stolen.channel("registry"))
    own, other = stolen.record("runner-1"), stolen.record("runner-2").node
    for node in (other, replace(other, node_id="node-of-nobody")):
        moved = replace(own, runner=replace(own.runner, node_id=node.node_id), node=node)
        newer = replace(moved, runner=replace(moved.runner, incarnation=own.runner.incarnation + 1))
        error = await refusal(stub.Register(registry_pb2.RegisterRequest(record=encode_runner_record(newer))))
        assert isinstance(error, PermissionDeniedError)
        assert "node-1" in error.message
    assert stolen.record("runner-1").node.node_id == "node-1"
    assert stolen.record("runner-2").node.node_id == "node-2"


async def test_no_renewal_and_no_token_moves_it_to_another_machine(stolen: Stolen, tmp_path: Path) -> None:
    renewal = stolen.mesh.at.where.named("identity")
    copy = TlsIdentity.load(stolen.directory)
    await CertificateKeeper(copy, stolen.directory, renewal=renewal, node="node-2").renew()
    assert copy.node == "node-1"
    shown = x509.load_pem_x509_certificate(copy.cert_pem).public_bytes(Encoding.DER)
    with pytest.raises(InvalidRequestError, match="name of this mesh's own"):
        stolen.mesh.at.service.office.renew(
            shown, certificate_request(copy.key_pem), addresses=[f"node-2.node.{DOMAIN}"]
        )
    with pytest.raises(NodeTakenError, match="--node node-2"):
        await stolen.mesh.at.join(tmp_path, await stolen.mesh.at.token(), name="guest", node="node-2")


@pytest.mark.parametrize("role", [Role.REGISTRY, Role.COORDINATOR, Role.IDENTITY])
async def test_nobody_takes_it_for_another_service(stolen: Stolen, role: Role) -> None:
    server = build_server(identity=stolen.identity, listen=["127.0.0.1:0"], services=[tiny_registry()])
    await server.start()
    try:
        posed = SpiffeId(DOMAIN, role, str(role))
        caller = stolen.mesh.kept["runner-runner-2"]
        async with open_channel(server.addresses[0], identity=caller, server=posed) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(path(SERVICES["registry"].methods_by_name["ListNodes"]))(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "ostname" in (refused.value.details() or "")
    finally:
        await server.stop(0)


async def test_tickets_that_it_signs_open_no_runner(stolen: Stolen) -> None:
    other = stolen.record("runner-2").runner
    me = await stolen.mesh.identity(Role.CLIENT, "accomplice")
    spec = encode_generation(GenerationRequest(model="", prompt=TextPrompt("hello")))
    [model] = other.models
    digest, until = spec_sha256(spec), time.time() + 60
    ticket = Ticket("t", str(me.spiffe_id), "runner-2", other.incarnation, digest, model.artifact.name, 0, until)
    signed = TicketSigner(stolen.identity).sign(ticket)
    server = SpiffeId(DOMAIN, Role.RUNNER, "runner-2")
    async with open_channel(other.address, identity=me, server=server) as channel:
        stub: Any = runner_pb2_grpc.ModelRunnerStub(channel)
        error = await refusal(stub.Generate(runner_pb2.GenerateRequest(spec=spec, ticket=signed)))
    assert isinstance(error, TicketGrantorError)


async def test_once_revoked_its_open_streams_end_and_nobody_answers_it_nor_renews_it(stolen: Stolen) -> None:
    registry: Any = registry_pb2_grpc.RegistryStub(await stolen.channel("registry"))
    runner: Any = runner_pb2_grpc.ModelRunnerStub(await stolen.channel("runner"))
    identity: Any = identity_pb2_grpc.IdentityStub(await stolen.channel("identity"))
    own, forever = stolen.record("runner-1").runner, asyncio.Event()

    async def leases() -> AsyncIterator[registry_pb2.KeepLeaseRequest]:
        yield registry_pb2.KeepLeaseRequest(
            heartbeat=registry_pb2.HeartbeatRequest(
                runner_id="runner-1", incarnation=own.incarnation, state=resources_pb2.RUNNER_STATE_READY
            )
        )
        await forever.wait()

    lease = registry.KeepLease(leases())
    assert await lease.read() is not grpc.aio.EOF
    told = identity.WatchRevocations(identity_pb2.WatchRevocationsRequest())
    await told.read()
    await runner.GetNode(runner_pb2.GetNodeRequest(), timeout=20)
    async with stolen.mesh.at.admin() as admin:
        await admin.revoke(stolen.identity.spiffe_id, "stolen")
    for stream in (lease, told):
        assert isinstance(await refusal(stream), RevokedError)
    other, heard = stolen.mesh.kept["runner-runner-2"], asyncio.Event()
    other.on_change(heard.set)
    while other.revoked.of(stolen.identity.spiffe_id, 1) is None:
        await heard.wait()
        heard.clear()
    for call in (
        runner.GetNode(runner_pb2.GetNodeRequest(), timeout=20),
        registry.Deregister(registry_pb2.DeregisterRequest(runner_id="runner-1", incarnation=own.incarnation)),
        identity.WatchRevocations(identity_pb2.WatchRevocationsRequest()),
    ):
        assert isinstance(await refusal(call), RevokedError)
    keeper = CertificateKeeper(stolen.identity, stolen.directory, renewal=stolen.mesh.at.where.named("identity"))
    with pytest.raises(RevokedError):
        await keeper.renew()
    await stolen.mesh.live.wait_until(lambda directory: directory.get("runner-1") is None)
    me = await stolen.mesh.identity(Role.CLIENT, "pat")
    async with stolen.mesh.client(me) as client:
        assert (await client.complete("echo:still here")).text == "still here"
