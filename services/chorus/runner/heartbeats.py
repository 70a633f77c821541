"""Heartbeats to one registry: over one long stream, or a call for each where the registry is older than the stream.

A stream that broke since the last heartbeat says nothing of the registry as it is now, which may have been restarted:
the heartbeat goes out again on a new one, and what that says counts.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from chorus.api.registry.v1 import registry_pb2 as pb
from chorus.core.errors import ChorusError, DeadlineExceededError, UnavailableError
from chorus.wire.errors import from_rpc_error


class Heartbeats:
    """One at a time, each answered. `stub` is the registry's, `peer` names it in errors."""

    def __init__(self, stub: Any, peer: str) -> None:
        self._stub = stub
        self._peer = peer
        self._stream: Any = None
        self._only_calls = False  # the registry has no stream of heartbeats

    async def send(self, heartbeat: pb.HeartbeatRequest, *, timeout_s: float, patient: bool) -> pb.HeartbeatResponse:
        """Returns the answer; `patient` waits for the connection. Raises what the registry says, or that it is mute."""
        try:
            async with asyncio.timeout(timeout_s):
                if not self._only_calls:
                    try:
                        return await self._on_stream(pb.KeepLeaseRequest(heartbeat=heartbeat), patient=patient)
                    except ChorusError as error:
                        code = error.metadata.get("grpc_code")
                        if code == grpc.StatusCode.UNIMPLEMENTED.name:
                            self._only_calls = True
                        # grpc.aio tells INTERNAL where a write meets a stream that was just refused; a call tells why.
                        elif code != grpc.StatusCode.INTERNAL.name:
                            raise
                return await self._in_a_call(heartbeat, patient=patient)
        except TimeoutError:
            raise DeadlineExceededError(f"{self._peer} did not answer a heartbeat within {timeout_s:.1f} s") from None

    def registered(self) -> None:
        """The registry has granted a lease: it may be a newer process than before, which has the stream."""
        self._only_calls = False

    def close(self) -> None:
        """Ends the stream; the next heartbeat begins another one."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None

    async def _on_stream(self, request: pb.KeepLeaseRequest, *, patient: bool) -> pb.HeartbeatResponse:
        if self._stream is not None:
            try:
                return await self._exchange(request)
            except ChorusError:
                pass
        self._stream = self._stub.KeepLease(wait_for_ready=patient)
        return await self._exchange(request)

    async def _exchange(self, request: pb.KeepLeaseRequest) -> pb.HeartbeatResponse:
        """One heartbeat and its answer; anything else ends the stream."""
        answer: Any = grpc.aio.EOF
        try:
            await self._stream.write(request)
            answer = await self._stream.read()
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=self._peer) from error
        except asyncio.InvalidStateError:  # it has ended before
            pass
        finally:
            if answer is grpc.aio.EOF:
                self.close()
        if answer is grpc.aio.EOF:
            raise UnavailableError(f"{self._peer} has ended the stream of heartbeats")
        lease: pb.HeartbeatResponse = answer.lease
        return lease

    async def _in_a_call(self, heartbeat: pb.HeartbeatRequest, *, patient: bool) -> pb.HeartbeatResponse:
        try:
            answer: pb.HeartbeatResponse = await self._stub.Heartbeat(heartbeat, wait_for_ready=patient)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=self._peer) from error
        return answer
