"""Keeping one lease at one registry: register, heartbeat as often as it says, and find it again after an outage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from chorus.api.registry.v1 import registry_pb2 as pb
from chorus.api.registry.v1 import registry_pb2_grpc
from chorus.config import Endpoint
from chorus.core.errors import ChorusError, StaleIncarnationError, UnknownLeaseError
from chorus.core.identity import Role, SpiffeId
from chorus.runner.heartbeats import Heartbeats
from chorus.runner.presence import Presence
from chorus.telemetry.logs import get_logger
from chorus.transport import TlsIdentity, open_channel
from chorus.wire.errors import from_rpc_error
from chorus.wire.resources import RUNNER_STATES, decode_duration, encode_load, encode_runner_record

_FIRST_INTERVAL_S = 0.5
"""Between attempts, until a registry has said what it wants."""

_RETRY_S = 0.25
_GOODBYE_S = 1.0
_HEARTBEAT_DEADLINE_S = 0.2  # at least; it may have to wait for the connection
_REGISTER_DEADLINE_S = 2.0  # of the first, a TLS handshake over a slow network is part
# A registry that was restarted must be found again well within its TTL.
_RECONNECT = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 400))

_log = get_logger()


class LeaseKeeper:
    """One lease. `run` goes on until cancelled, or until the registry knows a newer process of this runner.

    `jitter` gives numbers from 0 to 1: heartbeats come up to a tenth early, so that runners don't fall into step.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        presence: Presence,
        *,
        identity: TlsIdentity | None,
        insecure_loopback: bool,
        jitter: Callable[[], float],
    ) -> None:
        self._endpoint = endpoint
        self._presence = presence
        self._jitter = jitter
        server = (
            SpiffeId(identity.spiffe_id.trust_domain, Role.REGISTRY, endpoint.name or "registry") if identity else ""
        )
        self._channel = open_channel(
            endpoint.authority,
            identity=identity,
            server=server,
            insecure_loopback=insecure_loopback,
            options=_RECONNECT,
        )
        self._stub: Any = registry_pb2_grpc.RegistryStub(self._channel)
        self._heartbeats = Heartbeats(self._stub, self._peer)
        self._interval_s = _FIRST_INTERVAL_S
        self._registered: tuple[int, int] | None = None  # (incarnation, record version) that the registry has
        self._leased: int | None = None  # the incarnation that it has a lease of, or may have: the answer is on its way
        self._outage_since: float | None = None
        self._ever_registered = False

    @property
    def registered(self) -> bool:
        """Whether the registry answered last and has a lease of this runner."""
        return self._registered is not None and self._outage_since is None

    async def run(self) -> None:
        """Keeps the lease. Raises StaleIncarnationError where a newer process of this runner holds it."""
        while True:
            changed = self._presence.changed
            started = time.monotonic()
            try:
                await self._tell()
            except StaleIncarnationError:
                raise
            except ChorusError as error:
                if isinstance(error, UnknownLeaseError) and self._registered is not None:
                    self._registered = None  # restarted, or we were silent for too long; register at once
                    continue
                self._note_outage(error)
                await asyncio.sleep(max(0.0, _RETRY_S - (time.monotonic() - started)))
                continue
            self._note_answer()
            pause_s = self._interval_s * (1.0 - 0.1 * self._jitter()) - (time.monotonic() - started)
            await _first_of(changed, pause_s)

    async def close(self, *, goodbye: bool) -> None:
        """Ends the connection; with `goodbye` the lease is given back before, if the registry answers soon."""
        if goodbye and self._leased is not None:
            request = pb.DeregisterRequest(runner_id=self._presence.runner_id, incarnation=self._leased)
            try:
                await self._stub.Deregister(request, timeout=_GOODBYE_S)
            except grpc.RpcError as error:
                # The lease lapses by itself.
                why = from_rpc_error(error, peer=self._peer).message
                _log.info("registry.goodbye_failed", registry=str(self._endpoint), why=why)
        self._heartbeats.close()
        await self._channel.close()

    # --- inside -----------------------------------------------------------------------------------------------------

    async def _tell(self) -> None:
        """Registers where that is due, else sends a heartbeat. Raises what the registry answers."""
        presence = self._presence
        due = (presence.incarnation, presence.record_version)
        # While the registry is away a call waits for the connection, and goes out as soon as there is one.
        patient = self._outage_since is not None
        if self._registered != due:
            request = pb.RegisterRequest(record=encode_runner_record(presence.record()))
            before, self._leased = self._leased, presence.incarnation
            try:
                response = await self._stub.Register(request, timeout=_REGISTER_DEADLINE_S, wait_for_ready=patient)
            except grpc.RpcError as error:
                self._leased = before
                raise from_rpc_error(error, peer=self._peer) from error
            self._registered = due
            self._heartbeats.registered()
        else:
            timeout_s = max(_HEARTBEAT_DEADLINE_S, 1.5 * self._interval_s)
            response = await self._heartbeats.send(self._heartbeat(), timeout_s=timeout_s, patient=patient)
        self._interval_s = max(0.01, decode_duration(response.heartbeat_interval)) or _FIRST_INTERVAL_S

    def _heartbeat(self) -> pb.HeartbeatRequest:
        presence = self._presence
        return pb.HeartbeatRequest(
            runner_id=presence.runner_id,
            incarnation=presence.incarnation,
            sequence=presence.next_sequence(),
            state=RUNNER_STATES[presence.state],
            load=encode_load(presence.load()),
        )

    @property
    def _peer(self) -> str:
        return f"the registry {self._endpoint}"

    def _note_outage(self, error: ChorusError) -> None:
        """Tells of an outage once, when it begins."""
        if self._outage_since is None:
            self._outage_since = time.monotonic()
            event = "registry.lost" if self._ever_registered else "registry.unreachable"
            _log.warning(event, registry=str(self._endpoint), reason=error.reason, why=error.message)

    def _note_answer(self) -> None:
        if self._outage_since is not None or not self._ever_registered:
            away_s = 0.0 if self._outage_since is None else time.monotonic() - self._outage_since
            _log.info("registry.found", registry=str(self._endpoint), after_s=round(away_s, 3))
        self._outage_since = None
        self._ever_registered = True


async def _first_of(event: asyncio.Event, timeout_s: float) -> None:
    if timeout_s <= 0:
        return
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
