"""A certificate is replaced, ends or is revoked while connections stand that it made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio
import pytest

from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.core.errors import DrainingError, RevokedError, UnavailableError
from chorus.core.identity import Role
from chorus.core.identity.revocations import Revocation, Revocations
from chorus.identity.ca import CertificateAuthority
from chorus.testing.certificates import LOOPBACK, MeshCertificates, tls_identity
from chorus.transport import Service, TlsIdentity, build_server, open_channel
from chorus.transport.peer import authenticate
from chorus.wire.errors import from_rpc_error
from tests.mesh.tiny_registry import REGISTRY

MESH = MeshCertificates()
SERVER = MESH.id(Role.REGISTRY, "registry")
ASK = registry_pb2.ListNodesRequest()
WATCH = registry_pb2.WatchNodesRequest()


@dataclass
class Noting(registry_pb2_grpc.RegistryServicer):
    """Tells which certificate it was shown, by its serial number; a watch goes on until `enough`."""

    enough: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def ListNodes(self, request: Any, context: Any) -> Any:  # noqa: N802
        peer = authenticate(context, SERVER.trust_domain, 0)
        return registry_pb2.ListNodesResponse(next_page_token=str(peer.serial))

    async def WatchNodes(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            yield registry_pb2.WatchNodesResponse()
            await self.enough.wait()
            yield registry_pb2.WatchNodesResponse()
        finally:
            self.closed.set()


@dataclass
class Served:
    server: TlsIdentity
    client: TlsIdentity
    servicer: Noting
    channel: Any
    stub: Any
    address: str

    async def serial(self) -> int:
        return int((await self.stub.ListNodes(ASK, timeout=20)).next_page_token)


@asynccontextmanager
async def served(client: str = "kim") -> AsyncIterator[Served]:
    identity, servicer = MESH.identity(Role.REGISTRY, "registry"), Noting()
    service = Service(REGISTRY, registry_pb2_grpc.add_RegistryServicer_to_server, servicer)
    server = build_server(identity=identity, listen=["127.0.0.1:0"], services=[service])
    await server.start()
    caller = MESH.identity(Role.CLIENT, client)
    async with open_channel(server.addresses[0], identity=caller, server=SERVER) as channel:
        stub: Any = registry_pb2_grpc.RegistryStub(channel)
        yield Served(identity, caller, servicer, channel, stub, server.addresses[0])
    await server.stop(0)


def renewed_by(authority: CertificateAuthority, identity: TlsIdentity, ca_pem: bytes) -> TlsIdentity:
    leaf = authority.issue(identity.spiffe_id, MESH.policy, now=MESH.now, addresses=LOOPBACK)
    return TlsIdentity.from_pem(ca_pem=ca_pem, cert_pem=leaf.cert_pem, key_pem=leaf.key_pem)


async def until_serial_changes(served: Served, old: int) -> int:
    while (serial := await served.serial()) == old:
        pass  # each call lets the renewal go on
    return serial


async def test_new_calls_show_the_new_certificate_and_open_streams_go_on() -> None:
    async with served() as at:
        first = await at.serial()
        watch = at.stub.WatchNodes(WATCH)
        await watch.read()
        at.client.renew(MESH.identity(Role.CLIENT, "kim"))
        assert await until_serial_changes(at, first) != first
        at.servicer.enough.set()
        assert await watch.read() is not grpc.aio.EOF
        assert await watch.read() is grpc.aio.EOF
        assert await at.serial() != first


async def test_a_watch_of_the_connection_is_not_told_of_the_change() -> None:
    async with served() as at:
        first = await at.serial()
        ready = grpc.ChannelConnectivity.READY
        assert at.channel.get_state() is ready
        waiting = asyncio.create_task(at.channel.wait_for_state_change(ready))
        at.client.renew(MESH.identity(Role.CLIENT, "kim"))
        await until_serial_changes(at, first)
        assert at.channel.get_state() is ready
        assert not waiting.done()
        waiting.cancel()


async def test_an_authority_is_replaced_with_an_overlap() -> None:
    other = CertificateAuthority.create(
        MESH.policy, now=MESH.now - timedelta(days=1), trust_domain=MESH.authority.trust_domain
    )
    both = MESH.authority.certificate_pem + other.certificate_pem
    async with served() as at:
        first = await at.serial()
        # Everybody believes both, then the server is signed by the new one, then the client, then the old one is out.
        for identity in (at.server, at.client):
            identity.renew(renewed_by(MESH.authority, identity, both))
        second = await until_serial_changes(at, first)
        at.server.renew(renewed_by(other, at.server, both))
        at.client.renew(renewed_by(other, at.client, both))
        third = await until_serial_changes(at, second)
        at.server.renew(renewed_by(other, at.server, other.certificate_pem))
        at.client.renew(renewed_by(other, at.client, other.certificate_pem))
        await until_serial_changes(at, third)
        # Who missed it all is not let in by the server any more.
        kept = MESH.identity(Role.CLIENT, "late")
        late = TlsIdentity(other.certificate_pem, kept.cert_pem, kept.key_pem, kept.spiffe_id, kept.not_after)
        async with open_channel(at.address, identity=late, server=SERVER) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await registry_pb2_grpc.RegistryStub(channel).ListNodes(ASK, timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_open_stream_ends_with_its_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served() as at:
        watch = at.stub.WatchNodes(WATCH)
        await watch.read()
        late = at.client.not_after.timestamp()
        monkeypatch.setattr("chorus.transport.open_calls._now", lambda: late)
        monkeypatch.setattr("chorus.transport.open_calls._LOOK_S", 0.01)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await watch.read()
        error = from_rpc_error(ended.value)
        assert isinstance(error, DrainingError)  # who has a newer certificate goes on
        assert "has expired" in error.message
        await at.servicer.closed.wait()


async def test_who_is_revoked_is_out_at_once_open_streams_included() -> None:
    async with served("mallory") as at, served() as other:
        watch, unharmed = at.stub.WatchNodes(WATCH), other.stub.WatchNodes(WATCH)
        await watch.read()
        await unharmed.read()
        mallory = Revocation(at.client.spiffe_id, revoked_at=0, until=1, why="stolen")
        for server in (at.server, other.server):
            server.revoke(Revocations([mallory], revision=1))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await at.serial()
        for caught in (ended, refused):
            error = from_rpc_error(caught.value)
            assert isinstance(error, RevokedError)
            assert "stolen" in error.message
        await at.servicer.closed.wait()
        other.servicer.enough.set()
        assert await unharmed.read() is not grpc.aio.EOF
        at.server.revoke(Revocations(revision=2))
        assert await at.serial()


async def test_one_certificate_alone_can_be_revoked() -> None:
    async with served() as at:
        first = await at.serial()
        stolen = Revocation(at.client.spiffe_id, revoked_at=0, until=1, serials=frozenset({first}))
        at.server.revoke(Revocations([stolen], revision=1))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await at.serial()
        assert isinstance(from_rpc_error(refused.value), RevokedError)
        at.client.renew(tls_identity(MESH.leaf(Role.CLIENT, "kim")))
        async with open_channel(at.address, identity=at.client, server=SERVER) as channel:
            await registry_pb2_grpc.RegistryStub(channel).ListNodes(ASK, timeout=20)


async def test_a_revoked_server_is_called_no_more() -> None:
    async with served() as at:
        await at.serial()
        at.client.revoke(Revocations([Revocation(SERVER, revoked_at=0, until=1)], revision=1))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await at.serial()
        assert isinstance(from_rpc_error(refused.value, peer="the registry"), UnavailableError)
        assert "revoked" in str(refused.value.details())
        at.client.revoke(Revocations(revision=2))
        assert await at.serial()


def test_nobody_elses_files_are_taken_over() -> None:
    kim = MESH.identity(Role.CLIENT, "kim")
    with pytest.raises(Exception, match="is that of spiffe"):
        kim.renew(MESH.identity(Role.ADMIN, "kim"))
