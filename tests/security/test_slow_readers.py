"""Callers that take a server's time: streams that nobody reads, connections that never finish, and idle ones."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from chorus.api.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.client import SeenEvent
from chorus.core.errors import SlowReaderError
from chorus.core.events.records import EventKind
from chorus.core.generation import GenerationRequest, TextPrompt
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.mesh import InProcessMesh
from chorus.transport import Service, build_server, open_channel
from chorus.wire.generation import encode_generation
from tests.mesh.tiny_registry import REGISTRY
from tests.security.attackers import refusal

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESH = MeshCertificates()
SERVER = MESH.id(Role.REGISTRY, "registry")
ASK, WATCH = registry_pb2.ListNodesRequest(), registry_pb2.WatchNodesRequest()
LARGE = registry_pb2.WatchNodesResponse()
LARGE.event.snapshot.runners.add().runner.address = "x" * 200_000
SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 1024)]
"""A whole answer of the fake engine fits into what a server holds for a caller at most, else."""


class Flood(registry_pb2_grpc.RegistryServicer):
    """Its watches have always more to say; `ended` is set with the first that ends."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def ListNodes(self, request: Any, context: Any) -> Any:  # noqa: N802
        return registry_pb2.ListNodesResponse()

    async def WatchNodes(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            while True:
                yield LARGE
                await asyncio.sleep(0)
        finally:
            self.ended.set()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def flood() -> AsyncIterator[tuple[str, Flood]]:
    servicer = Flood()
    server = build_server(
        identity=MESH.identity(Role.REGISTRY, "registry"),
        listen=["127.0.0.1:0"],
        services=[Service(REGISTRY, registry_pb2_grpc.add_RegistryServicer_to_server, servicer)],
        slow_reader_s=1.0,
        idle_connection_s=1.0,
        options=[("grpc.server_handshake_timeout_ms", 1000)],
    )
    await server.start()
    yield server.addresses[0], servicer
    await server.stop(0)


def channel(address: str, name: str = "mallory", **options: Any) -> Any:
    return open_channel(address, identity=MESH.identity(Role.CLIENT, name), server=SERVER, **options)


async def test_a_stream_that_nobody_reads_is_cut_off_and_says_so_to_who_reads_on(flood: tuple[str, Flood]) -> None:
    address, servicer = flood
    async with asyncio.timeout(60), channel(address) as slow, channel(address, "kim") as quick:
        unread = registry_pb2_grpc.RegistryStub(slow).WatchNodes(WATCH)
        await unread.read()
        reading = registry_pb2_grpc.RegistryStub(quick).WatchNodes(WATCH)
        while not servicer.ended.is_set():  # who reads goes on meanwhile
            assert await reading.read() is not grpc.aio.EOF
        assert await reading.read() is not grpc.aio.EOF
        reading.cancel()
        error = await refusal(unread)
        assert await unread.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(error, SlowReaderError)
        assert "mesh.slow_reader_s" in error.message
        await registry_pb2_grpc.RegistryStub(slow).ListNodes(ASK)  # the connection is as good as before


async def test_an_answer_that_nobody_reads_frees_its_place_at_the_coordinator() -> None:
    async with asyncio.timeout(60), InProcessMesh(certificates=MESH, mesh={"slow_reader_s": 1.0}) as mesh:
        [coordinator] = mesh.coordinators
        server = MESH.id(Role.COORDINATOR, "coordinator-1")
        mallory = MESH.identity(Role.CLIENT, "mallory")
        async with open_channel(coordinator.address, identity=mallory, server=server, options=SMALL_WINDOW) as slow:
            stub: Any = coordinator_pb2_grpc.CoordinatorStub(slow)
            words = TextPrompt("echo:" + "word " * 380)
            spec = encode_generation(GenerationRequest(model="", prompt=words))
            call = stub.Generate(coordinator_pb2.GenerateRequest(spec=spec))
            await call.read()
            await until_a_request_has_ended(mesh)  # though nobody has read any more of it
            assert isinstance(await refusal(call), SlowReaderError)
        assert (await mesh.client().complete("echo:the next one")).text == "the next one"


async def until_a_request_has_ended(mesh: InProcessMesh) -> None:
    """Returns once a coordinator's event says so, also of one that ended a moment ago."""
    async with contextlib.aclosing(mesh.client(role=Role.ADMIN, name="root").watch_events(since_s=60)) as news:
        async for new in news:
            if isinstance(new, SeenEvent) and new.event.kind is EventKind.REQUEST_FINISHED:
                return


def tls_context(folder: Path) -> ssl.SSLContext:
    """What a client of the mesh would shake hands with."""
    leaf = MESH.leaf(Role.CLIENT, "mallory").write(folder, replace=True)
    context = ssl.create_default_context(cafile=leaf / "ca.crt")
    context.load_cert_chain(leaf / "tls.crt", leaf / "tls.key")
    context.set_alpn_protocols(["h2"])
    return context


async def closed(reader: asyncio.StreamReader) -> None:
    """Returns once the other side has closed, whatever it has sent before."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(65536):
            pass


async def test_connections_that_never_finish_stop_nobody_and_are_closed(
    flood: tuple[str, Flood], tmp_path: Path
) -> None:
    address, _ = flood
    host, _, port = address.partition(":")
    context = tls_context(tmp_path)
    async with asyncio.timeout(60):
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
        begun = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
        for _, writer in begun:
            writer.write(b"\x16\x03\x01\x02\x00\x01")  # the first bytes of a ClientHello
        # Proven to be a member, and then nothing, not even HTTP/2's first words.
        mute = [
            await asyncio.open_connection(host, int(port), ssl=context, server_hostname=SERVER.dns_name)
            for _ in range(5)
        ]
        async with channel(address, "kim") as other:
            await registry_pb2_grpc.RegistryStub(other).ListNodes(ASK)
        for reader, writer in (*silent, *begun, *mute):
            await closed(reader)
            writer.close()


async def test_a_connection_without_a_call_is_closed_and_the_next_call_makes_another(flood: tuple[str, Flood]) -> None:
    address, _ = flood
    async with asyncio.timeout(60), channel(address) as idle:
        stub: Any = registry_pb2_grpc.RegistryStub(idle)
        await stub.ListNodes(ASK)
        state = idle.get_state()
        assert state is grpc.ChannelConnectivity.READY
        await idle.wait_for_state_change(state)
        assert idle.get_state() is grpc.ChannelConnectivity.IDLE
        await stub.ListNodes(ASK)


async def test_a_connection_with_an_open_call_is_not_idle(flood: tuple[str, Flood]) -> None:
    address, _ = flood
    async with asyncio.timeout(60), channel(address) as busy, channel(address, "kim") as idle:
        watch = registry_pb2_grpc.RegistryStub(busy).WatchNodes(WATCH)
        stub: Any = registry_pb2_grpc.RegistryStub(idle)
        await stub.ListNodes(ASK)
        while idle.get_state() is grpc.ChannelConnectivity.READY:  # as long as it takes an idle one to be closed
            assert await watch.read() is not grpc.aio.EOF
        assert await watch.read() is not grpc.aio.EOF
        watch.cancel()


async def test_a_refused_flood_of_plain_bytes_ends_at_once(flood: tuple[str, Flood]) -> None:
    address, _ = flood
    host, _, port = address.partition(":")
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await closed(reader)
        writer.close()
        with socket.create_connection((host, int(port))):
            async with channel(address, "kim") as other:
                await registry_pb2_grpc.RegistryStub(other).ListNodes(ASK)
