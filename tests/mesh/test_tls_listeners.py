"""The listeners of a process: who reaches what on which, how they start, and how they end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.core.errors import ChorusError, ConfigError, DrainingError, NotFoundError, UnavailableError
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.transport import MeshServer, Service, build_server, open_channel, open_sync_channel
from chorus.transport.options import PING_INTERVAL_MS, PING_TIMEOUT_MS, client_options, server_options
from chorus.wire.errors import from_rpc_error
from tests.mesh.tiny_registry import REGISTRY, tiny_registry

PATIENCE_S = 20.0
CERTIFICATES = MeshCertificates()
SERVER = CERTIFICATES.id(Role.REGISTRY, "one")
IDENTITY = CERTIFICATES.identity(Role.REGISTRY, "one")
ALICE = CERTIFICATES.identity(Role.CLIENT, "alice")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@asynccontextmanager
async def running(**kwargs: Any) -> AsyncIterator[MeshServer]:
    given = {"identity": IDENTITY, "listen": ["127.0.0.1:0"], "services": [tiny_registry()]} | kwargs
    server = build_server(**given)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


# --- health ----------------------------------------------------------------------------------------------------------


async def test_health_is_told_per_service_and_watched() -> None:
    async with running() as server, open_channel(server.addresses[0], identity=ALICE, server=SERVER) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def state(service: str) -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            return int((await stub.Check(request, timeout=PATIENCE_S)).status)

        assert await state("") == await state(REGISTRY.full_name) == NOT_SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=REGISTRY.full_name), timeout=PATIENCE_S)
        assert (await watch.read()).status == NOT_SERVING
        server.health.set_serving(True)
        assert (await watch.read()).status == SERVING
        assert await state("") == await state(REGISTRY.full_name) == SERVING
        everything = await stub.List(health_pb2.HealthListRequest(), timeout=PATIENCE_S)
        assert set(everything.statuses) == {"", REGISTRY.full_name}
        with pytest.raises(grpc.RpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=PATIENCE_S)
        error = from_rpc_error(caught.value)
        assert isinstance(error, NotFoundError)
        assert REGISTRY.full_name in error.message
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"), timeout=PATIENCE_S)
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        unknown.cancel()
        server.drain()
        assert (await watch.read()).status == NOT_SERVING
        server.health.set_serving(True)
        assert await state("") == NOT_SERVING  # once draining, always draining
        watch.cancel()


async def test_watchers_of_health_do_not_hold_up_the_end() -> None:
    async with running() as server, open_channel(server.addresses[0], identity=ALICE, server=SERVER) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        await watch.read()
        async with asyncio.timeout(PATIENCE_S):
            await server.stop(10 * PATIENCE_S)
        with pytest.raises(grpc.RpcError) as caught:
            await watch.read()
        assert isinstance(from_rpc_error(caught.value), DrainingError)


async def test_the_plaintext_listener_tells_health_and_nothing_else() -> None:
    async with running(health_listen="127.0.0.1:0") as server:
        server.health.set_serving(True)
        assert server.health_address is not None
        async with open_channel(server.health_address, identity=None, insecure_loopback=True) as channel:
            request = health_pb2.HealthCheckRequest(service=REGISTRY.full_name)
            reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S)
            assert reply.status == SERVING
            listing = registry_pb2_grpc.RegistryStub(channel).ListNodes(
                registry_pb2.ListNodesRequest(), timeout=PATIENCE_S
            )
            assert await code_of(listing) is grpc.StatusCode.UNIMPLEMENTED
            assert await code_of(list_services(channel, "v1alpha")) is grpc.StatusCode.UNIMPLEMENTED
            top = channelz_pb2_grpc.ChannelzStub(channel).GetServers(
                channelz_pb2.GetServersRequest(), timeout=PATIENCE_S
            )
            assert await code_of(top) is grpc.StatusCode.UNIMPLEMENTED


# --- reflection and channelz -----------------------------------------------------------------------------------------


async def reflected(channel: grpc.aio.Channel, version: str, **asked: str) -> reflection_pb2.ServerReflectionResponse:
    # One request, sent with the call itself: grpc.aio tells INTERNAL where a write meets a refusal.
    call = channel.unary_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )(reflection_pb2.ServerReflectionRequest(**asked), timeout=PATIENCE_S)
    responses = [response async for response in call]
    assert len(responses) == 1
    return responses[0]


async def list_services(channel: grpc.aio.Channel, version: str) -> list[str]:
    answer = await reflected(channel, version, list_services="")
    return [service.name for service in answer.list_services_response.service]


@pytest.mark.parametrize("version", ["v1alpha", "v1"])
async def test_reflection_lists_what_is_served(version: str) -> None:
    async with running() as server, open_channel(server.addresses[0], identity=ALICE, server=SERVER) as channel:
        names = await list_services(channel, version)
    assert {REGISTRY.full_name, "grpc.health.v1.Health"} <= set(names)


@pytest.mark.parametrize(
    ("symbol", "known"),
    [
        (REGISTRY.full_name, True),
        (f"{REGISTRY.full_name}.Register", True),
        ("chorus.api.registry.v1.RegisterRequest.record", True),
        (f"{REGISTRY.full_name}.Nonsense", False),
        ("chorus.api.registry.v1.RegisterRequest.nonsense", False),
        ("nonsense", False),
        ("", False),
    ],
)
async def test_reflection_knows_members_too(symbol: str, known: bool) -> None:
    async with running() as server, open_channel(server.addresses[0], identity=ALICE, server=SERVER) as channel:
        answer = await reflected(channel, "v1", file_containing_symbol=symbol)
    assert bool(answer.file_descriptor_response.file_descriptor_proto) is known
    assert (answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]) is not known


@pytest.mark.parametrize("role", Role)
async def test_the_admin_listener_is_for_admins(role: Role) -> None:
    expected = grpc.StatusCode.OK if role is Role.ADMIN else grpc.StatusCode.PERMISSION_DENIED
    caller = CERTIFICATES.identity(role, "somebody")
    async with running(admin_listen="127.0.0.1:0") as server:
        assert server.admin_address is not None
        async with open_channel(server.admin_address, identity=caller, server=SERVER) as channel:
            stub = channelz_pb2_grpc.ChannelzStub(channel)
            assert await code_of(stub.GetServers(channelz_pb2.GetServersRequest(), timeout=PATIENCE_S)) is expected
            for version in ("v1alpha", "v1"):
                assert await code_of(list_services(channel, version)) is expected
            listing = registry_pb2_grpc.RegistryStub(channel).ListNodes(
                registry_pb2.ListNodesRequest(), timeout=PATIENCE_S
            )
            assert await code_of(listing) is grpc.StatusCode.UNIMPLEMENTED
        async with open_channel(server.addresses[0], identity=caller, server=SERVER) as channel:
            stub = channelz_pb2_grpc.ChannelzStub(channel)
            servers = stub.GetServers(channelz_pb2.GetServersRequest(), timeout=PATIENCE_S)
            assert await code_of(servers) is grpc.StatusCode.UNIMPLEMENTED


# --- pings -----------------------------------------------------------------------------------------------------------


def test_every_option_is_one_that_the_library_knows() -> None:
    # A misspelt option is ignored in silence, and the one below is often misspelt: then long silences end in GOAWAY.
    library = Path(cygrpc.__file__).read_bytes()
    names = {name for name, _ in (*client_options(), *server_options())}
    assert "grpc.http2.min_ping_interval_without_data_ms" in names
    assert [name for name in sorted(names) if name.encode() not in library] == []


def test_a_server_allows_the_pings_that_clients_send() -> None:
    client, server = dict(client_options()), dict(server_options())
    assert int(client["grpc.keepalive_time_ms"]) >= 2 * int(server["grpc.http2.min_ping_interval_without_data_ms"])
    for options in (client, server):
        assert options["grpc.keepalive_permit_without_calls"] == 1
        assert options["grpc.http2.max_pings_without_data"] == 0


async def test_a_peer_that_stands_still_is_given_up_as_soon_as_the_options_say() -> None:
    # As a machine does that was suspended, or a process that was stopped: the connection is open, and nothing comes.
    # With a tenth of our times; gRPC's own minute for a ping would outlast the test's patience.
    scaled = [(name, value // 10) for name, value in client_options() if value in (PING_INTERVAL_MS, PING_TIMEOUT_MS)]
    frozen = asyncio.Event()
    async with (
        running() as server,
        still_when(frozen, server.addresses[0]) as address,
        open_channel(address, identity=ALICE, server=SERVER, options=scaled) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        frozen.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(watch.read(), PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@asynccontextmanager
async def still_when(frozen: asyncio.Event, target: str) -> AsyncIterator[str]:
    """The address of something that passes bytes on, to and from `target`, until `frozen` is set."""
    host, _, port = target.rpartition(":")
    connections: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if not frozen.is_set():
                writer.write(data)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection(host, int(port))
        directions = {
            asyncio.create_task(copy(reader, onward_writer)),
            asyncio.create_task(copy(onward_reader, writer)),
        }
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        for task in directions:
            task.cancel()
        await asyncio.wait(directions)
        onward_writer.close()
        writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.create_task(pass_on(reader, writer)))

    between = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{between.sockets[0].getsockname()[1]}"
    finally:
        between.close()
        await asyncio.gather(*connections)


# --- starting and ending ---------------------------------------------------------------------------------------------


async def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for kwargs in ({"listen": [address]}, {"health_listen": address}, {"admin_listen": address}):
            with pytest.raises(ConfigError) as caught:
                async with running(**kwargs):
                    pass
            assert address in caught.value.message
            assert "another process listens" in caught.value.message


async def test_two_servers_never_share_a_port() -> None:
    async with running() as server:
        with pytest.raises(ConfigError, match="another process listens"):
            async with running(listen=[server.addresses[0]]):
                pass


async def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ConfigError, match="not an address of this machine"):
        async with running(listen=["192.0.2.1:0"]):
            pass


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:7101", "example.org:7101", "[::]:0"])
async def test_plaintext_stays_within_the_machine(address: str) -> None:
    with pytest.raises(ConfigError, match="not a loopback address"):
        build_server(identity=None, listen=[address], services=[tiny_registry()], insecure_loopback=True)
    if not address.endswith(":0"):
        for dial in (open_channel, open_sync_channel):
            with pytest.raises(ConfigError, match="not a loopback address"):
                dial(address, identity=None, insecure_loopback=True)


async def test_plaintext_has_to_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="needs a certificate"):
        build_server(identity=None, listen=["127.0.0.1:0"], services=[tiny_registry()])
    with pytest.raises(ConfigError, match="needs a certificate"):
        open_channel("127.0.0.1:7101", identity=None)
    # An admin listener is no exception; a health listener is one by design.
    with pytest.raises(ConfigError, match="not a loopback address"):
        build_server(
            identity=None, listen=["127.0.0.1:0"], admin_listen="0.0.0.0:0", services=[], insecure_loopback=True
        )


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1", "127.0.0.1:x", "::1:7101", "127.0.0.1:70000"])
async def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError):
        build_server(identity=IDENTITY, listen=[address], services=[])
    with pytest.raises(ConfigError):
        open_channel(address, identity=ALICE, server=SERVER)


async def test_a_dial_says_who_must_answer() -> None:
    with pytest.raises(ConfigError, match="who must answer"):
        open_channel("127.0.0.1:7101", identity=ALICE)
    with pytest.raises(ConfigError, match="port 0"):
        open_channel("127.0.0.1:0", identity=ALICE, server=SERVER)


async def test_no_option_undoes_the_pin() -> None:
    async with running(identity=CERTIFICATES.identity(Role.RUNNER, "one")) as impostor:
        override = [("grpc.ssl_target_name_override", "one.runner.test.chorus.local")]
        async with open_channel(impostor.addresses[0], identity=ALICE, server=SERVER, options=override) as channel:
            stub = registry_pb2_grpc.RegistryStub(channel)
            listing = stub.ListNodes(registry_pb2.ListNodesRequest(), timeout=PATIENCE_S)
            assert await code_of(listing) is grpc.StatusCode.UNAVAILABLE


async def test_several_addresses_are_one_server() -> None:
    async with running(listen=["127.0.0.1:0", "[::1]:0"]) as server:
        assert server.addresses[1].startswith("[::1]:")
        for address in server.addresses:
            async with open_channel(address, identity=ALICE, server=SERVER) as channel:
                stub = registry_pb2_grpc.RegistryStub(channel)
                assert (await stub.ListNodes(registry_pb2.ListNodesRequest(), timeout=PATIENCE_S)).epoch == 7


async def test_a_synchronous_channel_does_as_well() -> None:
    async with running() as server:

        def call() -> int:
            with open_sync_channel(server.addresses[0], identity=ALICE, server=SERVER) as channel:
                stub = registry_pb2_grpc.RegistryStub(channel)
                return int(stub.ListNodes(registry_pb2.ListNodesRequest(), timeout=PATIENCE_S).epoch)

        assert await asyncio.to_thread(call) == 7


class Endless(registry_pb2_grpc.RegistryServicer):
    """Watches that nobody ends but the server's own end."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def WatchNodes(self, request, context):  # noqa: N802
        try:
            yield registry_pb2.WatchNodesResponse()
            await asyncio.Event().wait()
        finally:
            self.closed.set()


async def test_calls_that_outlast_the_grace_are_cancelled_and_may_be_retried() -> None:
    endless = Endless()
    service = Service(REGISTRY, registry_pb2_grpc.add_RegistryServicer_to_server, endless)
    async with (
        running(services=[service]) as server,
        open_channel(server.addresses[0], identity=ALICE, server=SERVER) as channel,
    ):
        watch = registry_pb2_grpc.RegistryStub(channel).WatchNodes(registry_pb2.WatchNodesRequest(), timeout=PATIENCE_S)
        await watch.read()
        assert server.calls_in_flight == 1
        await server.stop(0.05)
        with pytest.raises(grpc.RpcError) as caught:
            await watch.read()
        error: ChorusError = from_rpc_error(caught.value, peer="the registry one")
        assert isinstance(error, UnavailableError)
        assert "the registry one" in error.message
        async with asyncio.timeout(PATIENCE_S):
            await endless.closed.wait()
        assert server.calls_in_flight == 0


async def test_a_restarted_server_is_found_again_by_the_same_channel() -> None:
    async with running() as server:
        address = server.addresses[0]
        async with open_channel(address, identity=ALICE, server=SERVER) as channel:
            stub = registry_pb2_grpc.RegistryStub(channel)
            await stub.ListNodes(registry_pb2.ListNodesRequest(), timeout=PATIENCE_S)
            await server.stop(0)
            listing = stub.ListNodes(registry_pb2.ListNodesRequest(), timeout=PATIENCE_S)
            assert await code_of(listing) is grpc.StatusCode.UNAVAILABLE
            async with running(listen=[address]):
                response = await stub.ListNodes(
                    registry_pb2.ListNodesRequest(), timeout=PATIENCE_S, wait_for_ready=True
                )
                assert response.epoch == 7
