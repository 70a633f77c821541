"""A bare grpc.aio relay: passes the bytes of every call on to one upstream, over the same TLS as the services use.

It decides nothing, parses nothing and logs nothing, so it is the least that a hop through Python's gRPC can cost; what
a coordinator costs beyond it is Chorus' own. With `uvloop` as its last argument it runs on that event loop, as
coordinators do, else on asyncio's.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop

from chorus.core.identity import SpiffeId
from chorus.transport import TlsIdentity, open_channel
from chorus.transport.options import server_options


def _as_is(raw: bytes) -> bytes:
    return raw


class _Everything(grpc.GenericRpcHandler):
    """Handles whatever method is called, renamed from the coordinator's to the runner's service."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def service(self, details: Any) -> Any:
        method = details.method.replace("/chorus.api.coordinator.v1.Coordinator/", "/chorus.api.runner.v1.ModelRunner/")
        if method.endswith("/Generate"):
            stream = self._channel.unary_stream(method, request_serializer=_as_is, response_deserializer=_as_is)

            async def pass_stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
                call = stream(request, timeout=context.time_remaining())
                try:
                    async for message in call:
                        yield message
                finally:
                    call.cancel()

            return grpc.unary_stream_rpc_method_handler(pass_stream)
        unary = self._channel.unary_unary(method, request_serializer=_as_is, response_deserializer=_as_is)

        async def pass_unary(request: bytes, context: Any) -> bytes:
            response: bytes = await unary(request, timeout=context.time_remaining())
            return response

        return grpc.unary_unary_rpc_method_handler(pass_unary)


async def serve(upstream: str, upstream_name: str, certificates: Path) -> None:
    """Relays until it is terminated; prints the port it listens on."""
    identity = TlsIdentity.load(certificates)
    credentials = grpc.ssl_server_credentials(
        [(identity.key_pem, identity.cert_pem)], root_certificates=identity.ca_pem, require_client_auth=True
    )
    async with open_channel(upstream, identity=identity, server=SpiffeId.parse(upstream_name)) as channel:
        server = grpc.aio.server(options=server_options())
        server.add_generic_rpc_handlers((_Everything(channel),))
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        print(port, flush=True)
        await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if sys.argv[4:] == ["uvloop"] else None) as runner:
        runner.run(serve(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
