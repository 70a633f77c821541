"""Direct mode: the client asks a coordinator for a place and a ticket, and streams from the runner itself.

`auto`, the default, does so from a client's second generation on: a ticket and a handshake with the runner cost more
than a hop saves a program that asks once, and whoever asks again wants the hop away from every token. Where a runner
can't be reached, or tickets aren't to be had, requests are relayed, and direct mode rests for a while. `always` begins
with the first one, waits for a turn instead of having the relay wait, and says so where a runner can't be reached.

A stream that breaks off goes on through the relay in either mode: coordinators know who has the same file.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import grpc
import grpc.aio

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.api.runner.v1 import runner_pb2
from chorus.client.carrying import Carrying
from chorus.client.channel import CoordinatorChannel
from chorus.client.coordinators import Coordinators, Metadata, lost, too_late
from chorus.client.runners import RunnerChannel, RunnerChannels
from chorus.core.errors import (
    CancelledError,
    ChorusError,
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    TicketError,
    UnavailableError,
)
from chorus.core.generation import Substitution
from chorus.core.resilience.stream_silence import patience_with
from chorus.telemetry.logs import get_logger
from chorus.transport import TlsIdentity
from chorus.transport.guarding import StreamGuard, is_being_cancelled
from chorus.wire.errors import from_rpc_error
from chorus.wire.fallback import decode_substitution

DirectMode: TypeAlias = Literal["auto", "never", "always"]

# A handshake over a slow Wi-Fi is done by then; what takes longer is better relayed.
CONNECT_TIMEOUT_S = 1.0
# Where runners can't be reached once, they can't be reached a moment later.
REST_S, LONGEST_REST_S = 60.0, 600.0
# Without a free place, the relay's queue is where to wait.
FULL_REST_S = 1.0

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a generation may be asked for: at a runner, with a ticket of a coordinator's."""

    coordinator: CoordinatorChannel
    channel: RunnerChannel
    ticket_id: str
    request: runner_pb2.GenerateRequest
    substitution: Substitution | None = None


@dataclass(frozen=True, slots=True)
class Relayed:
    """It is to be relayed instead, best by the coordinator that granted a ticket in vain."""

    coordinator: CoordinatorChannel | None = None
    ticket_id: str = ""


class Direct:
    """Direct mode of one client. Without an `identity`, in a mesh without certificates, there is none."""

    def __init__(self, mode: DirectMode, coordinators: Coordinators, *, identity: TlsIdentity | None) -> None:
        self._mode = mode
        self._coordinators = coordinators
        self._runners = RunnerChannels(identity) if identity is not None else None
        self._generations = 0
        self._rest_s = REST_S
        self._not_before = 0.0

    def is_next(self) -> bool:
        """Whether the next generation, which is counted, is to be direct."""
        self._generations += 1
        if self._mode == "never" or self._runners is None:
            return False
        return self._mode == "always" or (self._generations > 1 and self._coordinators.now >= self._not_before)

    async def place(self, message: pb.GenerateRequest, *, metadata: Metadata, left_s: float) -> Placed | Relayed:
        """Gets a ticket, and a connection to its runner. Raises ChorusErrors in mode `always` alone."""
        always = self._mode == "always"
        coordinator = self._coordinators.choose()
        if coordinator is None or self._runners is None:
            return Relayed()
        asked = pb.PlaceRequest(spec=message.spec, fallback=message.fallback, wait=always)
        try:
            placed = await self._coordinators.ask(coordinator, "Place", asked, metadata=metadata, timeout_s=left_s)
        except ChorusError as error:
            if lost(error):
                return Relayed()
            if always:
                raise
            self._rest(FULL_REST_S if isinstance(error, OverloadedError) else REST_S, error)
            return Relayed()
        try:
            channel = await self._runners.to(placed)
            await channel.connected(min(left_s, CONNECT_TIMEOUT_S))
        except ChorusError as error:
            if always:
                raise
            self._rest(self._rest_s, error)
            self._rest_s = min(2.0 * self._rest_s, LONGEST_REST_S)
            return Relayed(coordinator, placed.ticket_id)
        self._rest_s = REST_S
        request = runner_pb2.GenerateRequest(spec=message.spec, attempt=message.attempt, ticket=placed.ticket)
        substitution = decode_substitution(placed.substitution) if placed.HasField("substitution") else None
        return Placed(coordinator, channel, placed.ticket_id, request, substitution)

    async def messages(
        self, placed: Placed, carrying: Carrying, *, metadata: Metadata, timeout_s: float, given_s: float
    ) -> AsyncGenerator[runner_pb2.GenerateResponse]:
        """The runner's messages; closing it ends the call. Raises ChorusErrors."""
        channel = placed.channel
        call = channel.generate(placed.request, timeout=timeout_s, metadata=metadata)
        guard = StreamGuard(
            channel,
            call,
            patience=patience_with(carrying.priority),
            wait_s=0.0,
            goes_elsewhere=lambda _alive: not carrying.obstacle,
            clock=lambda: self._coordinators.now,
        )
        channel.uses += 1
        try:
            with guard:
                async for message in call:
                    guard.watch.heard(self._coordinators.now, tokens=message.event.HasField("delta"))
                    yield message
                    guard.watch.listening(self._coordinators.now)
        except (grpc.RpcError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and (guard.left is None or is_being_cancelled()):
                raise
            raise guard.left or _of_runner(error, channel, given_s) from error
        finally:
            channel.uses -= 1
            call.cancel()

    def refused(self, error: ChorusError) -> None:
        """A runner did not take a ticket, as where clocks are far apart: the next one would hardly fare better."""
        if isinstance(error, TicketError) and self._mode == "auto":
            self._rest(REST_S, error)

    async def close(self) -> None:
        """Closes the connections to runners."""
        if self._runners is not None:
            await self._runners.close()

    def _rest(self, seconds: float, why: ChorusError) -> None:
        self._not_before = self._coordinators.now + seconds
        _log.debug("direct.relayed", reason=why.reason, why=why.message, rest_s=seconds)


def _of_runner(error: Any, channel: RunnerChannel, given_s: float) -> ChorusError:
    """A call's error. Without ErrorInfo it is the transport's word: the connection's trouble, not the request's."""
    failure = from_rpc_error(error, peer=channel.called)
    if "grpc_code" not in failure.metadata:
        return failure
    if isinstance(failure, DeadlineExceededError):
        return too_late(given_s)
    if isinstance(failure, CancelledError | InternalError):
        return UnavailableError(f"the call to {channel.called} was broken off ({failure.message})")
    return failure
