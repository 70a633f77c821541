"""The Registry service: messages in, one call of the board, messages out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from chorus.api.registry.v1 import registry_pb2 as pb
from chorus.api.registry.v1 import registry_pb2_grpc
from chorus.config import Endpoint
from chorus.core.errors import InvalidRequestError, PermissionDeniedError
from chorus.core.fleet.claims import Claim
from chorus.core.fleet.listing import list_nodes
from chorus.core.fleet.records import Runner
from chorus.core.identity import Role
from chorus.registry.board import LeaseBoard
from chorus.transport import current_caller
from chorus.transport.peer import caller_host, caller_nodes
from chorus.wire.directory import DirectoryEncoder, decode_filter, encode_node_entry
from chorus.wire.resources import ReceivedLoad, decode_runner_record, decode_runner_state, encode_duration

# Heartbeats of one stream that are read in the time in which one is due.
_MOST_IN_AN_INTERVAL = 10


class RegistryServicer(registry_pb2_grpc.RegistryServicer):
    """What a registry answers. Who may call what at all has been decided before; here it is whose lease it is."""

    def __init__(self, board: LeaseBoard, *, heartbeat_interval_s: float) -> None:
        self._board = board
        self._terms = {
            "ttl": encode_duration(board.table.ttl_s),
            "heartbeat_interval": encode_duration(heartbeat_interval_s),
        }
        # The same for everybody, a thousand times a second.
        lease = pb.HeartbeatResponse(**self._terms)
        self._heard = lease.SerializeToString()
        self._kept = pb.KeepLeaseResponse(lease=lease).SerializeToString()
        self._least_gap_s = heartbeat_interval_s / _MOST_IN_AN_INTERVAL
        self._encoder = DirectoryEncoder()

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:
        """Takes a runner into the directory."""
        record = decode_runner_record(request.record)
        _check_own(record.runner.runner_id)
        _check_dialling(record.runner)
        self._board.register(record, _claim(context))
        return pb.RegisterResponse(epoch=self._board.table.epoch, **self._terms)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> bytes:  # type: ignore[override]
        """Renews a lease."""
        self._renew(request)
        return self._heard

    async def KeepLease(  # type: ignore[override]
        self,
        requests: AsyncIterator[pb.KeepLeaseRequest],
        context: Any,
    ) -> None:
        """Renews a lease with each message."""
        due = -math.inf
        async with self._board.while_open():
            async for request in requests:
                now = self._board.now
                self._renew(request.heartbeat)
                await context.write(self._kept)
                # One that is early is read at once, as when a runner drains; but a flood is not.
                if (early_s := due - now) > 0:
                    await asyncio.sleep(early_s)
                due = max(now, due) + self._least_gap_s

    async def Deregister(self, request: pb.DeregisterRequest, context: Any) -> pb.DeregisterResponse:
        """Ends a lease."""
        caller = current_caller()
        if caller is not None and caller.role is not Role.ADMIN:
            _check_own(request.runner_id)
            if request.incarnation == 0:
                raise InvalidRequestError("incarnation", "must be the runner's own; only admins may say any")
        self._board.deregister(request.runner_id, request.incarnation or None)
        return pb.DeregisterResponse()

    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:
        """Lists a page of nodes."""
        board, table = self._board, self._board.table
        page = list_nodes(
            table.leased(board.now),
            condition=decode_filter(request.filter),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListNodesResponse(
            nodes=[encode_node_entry(entry) for entry in page.nodes],
            next_page_token=page.next_page_token,
            epoch=table.epoch,
            revision=table.revision,
            synced=table.synced,
        )

    async def WatchNodes(  # type: ignore[override]
        self,
        request: pb.WatchNodesRequest,
        context: Any,
    ) -> AsyncIterator[bytes]:
        """Watches the directory."""
        async with aclosing(self._board.watch(without_load=request.without_load)) as events:
            async for event in events:
                yield self._encoder.response(event)

    def _renew(self, request: pb.HeartbeatRequest) -> None:
        _check_own(request.runner_id)
        state = decode_runner_state(request.state)
        if state is None:
            raise InvalidRequestError("state", "must be starting, ready or draining")
        load = ReceivedLoad(request.load)  # nobody here looks into it
        self._board.heartbeat(request.runner_id, request.incarnation, request.sequence, state, load)


def _claim(context: Any) -> Claim:
    """How far the caller is to be believed about its node; on a mesh without TLS everybody is."""
    return Claim() if current_caller() is None else Claim(caller_nodes(), caller_host(context))


def _check_own(runner_id: str) -> None:
    """Raises PermissionDeniedError where the caller is another runner; on a mesh without TLS nobody is anybody."""
    caller = current_caller()
    if caller is not None and caller.name != runner_id:
        raise PermissionDeniedError(
            f"{caller} may speak for runner {caller.name} alone, not for {runner_id[:80]!r}",
            metadata={"runner_id": runner_id[:80]},
        )


def _check_dialling(runner: Runner) -> None:
    """Raises unless coordinators can dial the runner and will then find the caller there."""
    caller = current_caller()
    if caller is not None and runner.server_name != caller.dns_name:
        raise PermissionDeniedError(
            f"{caller} is dialled as {caller.dns_name}, not as {runner.server_name[:300]!r}",
            metadata={"runner_id": runner.runner_id},
        )
    try:
        endpoint = Endpoint.parse(runner.address)
    except ValueError as error:
        raise InvalidRequestError("record.runner.address", str(error)) from None
    if endpoint.is_wildcard or endpoint.name is not None:
        raise InvalidRequestError(
            "record.runner.address",
            f"{runner.address!r} cannot be dialled; set runner.advertise to HOST:PORT by which others reach it",
        )
