"""Watching the registries: one channel and one stream for each address of each, begun anew whenever it breaks.

A host name may stand for several replicas (a headless service in Kubernetes), which know nothing of each other. A
balanced channel would mix them, so the name is resolved here, and every address is watched by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.config import Endpoint
from chorus.coordinator.live import LiveDirectory
from chorus.core.errors import ChorusError, UnavailableError
from chorus.core.identity import Role, SpiffeId
from chorus.telemetry import context
from chorus.telemetry.logs import get_logger
from chorus.transport.channel import open_channel
from chorus.transport.renewing import is_shut_out
from chorus.transport.resolve import resolve
from chorus.transport.tls import TlsIdentity
from chorus.wire.directory import DirectoryDecoder
from chorus.wire.errors import from_rpc_error

SILENCE_S = 3.0
"""A registry says something every second; a stream that is silent for this long is broken."""

_RESOLVE_INTERVAL_S = 5.0
_BACKOFF_S = (0.1, 0.2, 0.4, 0.7, 1.0)

_log = get_logger()


@dataclass(frozen=True, slots=True)
class RegistryHealth:
    """How a coordinator stands with one registry. `last_heard_s` ago; None if never."""

    address: str
    connected: bool
    synced: bool
    problem: str
    last_heard_s: float | None


class RegistryWatch:
    """The watch of one registry at one address; `run` goes on until it is cancelled."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        directory: LiveDirectory,
        identity: TlsIdentity | None,
        insecure_loopback: bool,
        silence_s: float = SILENCE_S,
        decoder: DirectoryDecoder | None = None,
    ) -> None:
        """`decoder` may be shared with the watches of other registries, which tell of the same runners."""
        self.key = str(endpoint)
        self._endpoint = endpoint
        self._directory = directory
        self._identity = identity
        self._insecure_loopback = insecure_loopback
        self._silence_s = silence_s
        self._decoder = decoder if decoder is not None else DirectoryDecoder()
        self._connected = False
        self._synced = False
        self._problem = "not asked yet"
        self._heard_at: float | None = None

    def health(self) -> RegistryHealth:
        """How we stand with it now."""
        heard_s = None if self._heard_at is None else max(0.0, self._directory.now - self._heard_at)
        return RegistryHealth(self.key, self._connected, self._synced, self._problem, heard_s)

    async def run(self) -> None:
        """Watches, and begins anew after every failure."""
        server = (
            SpiffeId(self._identity.spiffe_id.trust_domain, Role.REGISTRY, self._endpoint.name or "registry")
            if self._identity is not None
            else ""
        )
        channel = open_channel(
            self._endpoint.authority,
            identity=self._identity,
            server=server,
            insecure_loopback=self._insecure_loopback,
        )
        failures = 0
        try:
            while True:
                with context.bound(context.new_context()):
                    problem = await self._watch_once(channel)
                failures = 0 if self._connected else failures + 1
                self._lost(problem)
                await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
        finally:
            self._directory.registry_lost(self.key)
            await channel.close()

    async def _watch_once(self, channel: grpc.aio.Channel) -> ChorusError:
        """Watches until the stream breaks; returns why it did."""
        stub: Any = registry_pb2_grpc.RegistryStub(channel)
        call = stub.WatchNodes(registry_pb2.WatchNodesRequest(), metadata=context.outgoing_metadata())
        messages = aiter(call)
        try:
            while True:
                async with asyncio.timeout(self._silence_s):
                    message = await anext(messages, None)
                if message is None:
                    return UnavailableError("it ended the watch")
                if is_shut_out(channel):
                    return UnavailableError("it was revoked by an admin")
                event = self._decoder.decode(message.event)
                self._directory.apply(self.key, event)
                self._heard(synced=event.synced)
        except TimeoutError:
            return UnavailableError(f"it said nothing for {self._silence_s:g} s")
        except grpc.RpcError as error:
            return from_rpc_error(error, peer=f"the registry {self.key}")
        except ChorusError as error:
            return error
        finally:
            call.cancel()

    def _heard(self, *, synced: bool) -> None:
        self._heard_at = self._directory.now
        if not self._connected:
            _log.info("registry.connected", registry=self.key, synced=synced)
        self._connected, self._synced, self._problem = True, synced, ""

    def _lost(self, error: ChorusError) -> None:
        # Once for each way in which it fails, not at every attempt.
        if self._connected or error.message != self._problem:
            _log.warning("registry.lost", registry=self.key, reason=error.reason, why=error.message)
        self._connected, self._synced, self._problem = False, False, error.message
        self._directory.registry_lost(self.key)


class Registries:
    """The watches of every configured registry, each at every address that its name has."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        *,
        directory: LiveDirectory,
        identity: TlsIdentity | None,
        insecure_loopback: bool,
    ) -> None:
        self._endpoints = tuple(endpoints)
        self._decoder = DirectoryDecoder()
        self._directory = directory
        self._identity = identity
        self._insecure_loopback = insecure_loopback
        self._addresses: dict[Endpoint, frozenset[Endpoint]] = {}  # of each configured name
        self._unresolved: dict[Endpoint, str] = {}
        self._watches: dict[Endpoint, tuple[RegistryWatch, asyncio.Task[None]]] = {}

    def health(self) -> tuple[RegistryHealth, ...]:
        """How we stand with each, by address; a name that leads nowhere is listed too."""
        known = [watch.health() for watch, _ in self._watches.values()]
        known += [RegistryHealth(str(at), False, False, why, None) for at, why in self._unresolved.items()]
        return tuple(sorted(known, key=lambda health: health.address))

    async def run(self) -> None:
        """Watches until it is cancelled. Raises ConfigError where an endpoint may not be dialled at all."""
        async with asyncio.TaskGroup() as group:
            for endpoint in self._endpoints:
                group.create_task(self._keep_up(endpoint, group))

    async def _keep_up(self, endpoint: Endpoint, group: asyncio.TaskGroup) -> None:
        """Follows the addresses of one name; a name that takes long to look up holds nobody else up."""
        while True:
            await self._look_up(endpoint)
            self._follow(group)
            if endpoint.ip is not None:
                return  # an address doesn't change
            await asyncio.sleep(_RESOLVE_INTERVAL_S)

    async def _look_up(self, endpoint: Endpoint) -> None:
        """Finds the addresses of a name. Where that fails, those that it had stay: a resolver that is down must not end
        what works."""
        try:
            self._addresses[endpoint] = await resolve(endpoint)
        except OSError as error:
            if endpoint in self._addresses:
                return
            why = error.strerror or str(error)
            if endpoint not in self._unresolved:
                _log.warning("registry.unresolved", registry=str(endpoint), why=why)
            self._unresolved[endpoint] = f"its name cannot be resolved: {why}"
        else:
            self._unresolved.pop(endpoint, None)

    def _follow(self, group: asyncio.TaskGroup) -> None:
        """Begins the watches of new addresses, and ends those of addresses that no name has any more."""
        wanted = {address for addresses in self._addresses.values() for address in addresses}
        for address in wanted - self._watches.keys():
            watch = RegistryWatch(
                address,
                directory=self._directory,
                identity=self._identity,
                insecure_loopback=self._insecure_loopback,
                decoder=self._decoder,
            )
            self._watches[address] = (watch, group.create_task(watch.run()))
        for address in self._watches.keys() - wanted:
            self._watches.pop(address)[1].cancel()
