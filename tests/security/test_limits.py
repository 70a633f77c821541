"""What one caller may take of a service: calls at once, bytes of a message, bytes of metadata."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.core.errors import OverloadedError
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.transport import Service, build_server, open_channel
from chorus.transport.options import REQUEST_MAX_BYTES
from chorus.wire.errors import from_rpc_error
from tests.mesh.tiny_registry import REGISTRY

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESH = MeshCertificates()
SERVER = MESH.id(Role.REGISTRY, "registry")
ASK, WATCH = registry_pb2.ListNodesRequest(), registry_pb2.WatchNodesRequest()
MOST = 3


class Patient(registry_pb2_grpc.RegistryServicer):
    """Its watches never end."""

    async def ListNodes(self, request: Any, context: Any) -> Any:  # noqa: N802
        return registry_pb2.ListNodesResponse()

    async def WatchNodes(self, request: Any, context: Any) -> Any:  # noqa: N802
        yield registry_pb2.WatchNodesResponse()
        await asyncio.Event().wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address() -> AsyncIterator[str]:
    server = build_server(
        identity=MESH.identity(Role.REGISTRY, "registry"),
        listen=["127.0.0.1:0"],
        services=[Service(REGISTRY, registry_pb2_grpc.add_RegistryServicer_to_server, Patient())],
        max_calls_per_caller=MOST,
    )
    await server.start()
    yield server.addresses[0]
    await server.stop(0)


def channel(address: str, name: str = "mallory", **options: Any) -> Any:
    return open_channel(address, identity=MESH.identity(Role.CLIENT, name), server=SERVER, **options)


async def is_let(by: Any) -> bool:
    """Whether a call is answered, and not refused as one too many."""
    try:
        await registry_pb2_grpc.RegistryStub(by).ListNodes(ASK)
    except grpc.aio.AioRpcError as error:
        if isinstance(from_rpc_error(error), OverloadedError):
            return False
        raise
    return True


async def test_a_caller_with_too_many_calls_is_refused_over_all_its_connections_and_nobody_else_is(
    address: str,
) -> None:
    async with asyncio.timeout(60), channel(address) as one, channel(address) as two, channel(address, "kim") as other:
        watches = [registry_pb2_grpc.RegistryStub(which).WatchNodes(WATCH) for which in (one, two, one)]
        for watch in watches:
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await registry_pb2_grpc.RegistryStub(two).ListNodes(ASK)
        error = from_rpc_error(refused.value)
        assert isinstance(error, OverloadedError)
        assert "mesh.max_calls_per_caller" in error.message
        assert error.retry_after_s
        await registry_pb2_grpc.RegistryStub(other).ListNodes(ASK)
        watches[0].cancel()
        while not await is_let(two):  # the server hears of it a moment later
            pass


async def test_a_message_that_is_too_long_is_refused_unread(address: str) -> None:
    unlimited = [("grpc.max_send_message_length", -1)]
    async with asyncio.timeout(60), channel(address, options=unlimited) as any_length:
        call = any_length.unary_unary("/chorus.api.registry.v1.Registry/ListNodes")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"\0" * (REQUEST_MAX_BYTES + 1))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_that_is_too_long_is_refused_and_some_is_not(address: str) -> None:
    async with asyncio.timeout(60), channel(address) as plain:
        stub = registry_pb2_grpc.RegistryStub(plain)
        await stub.ListNodes(ASK, metadata=(("x-note", "a" * 4_000),))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListNodes(ASK, metadata=(("x-note", "a" * 40_000),))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
