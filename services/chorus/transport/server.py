"""A process's gRPC servers: one over mutual TLS for the mesh, and, each an object of its own, a plaintext one for
health alone, one for operators, and those for callers without a certificate. A port of a gRPC server exposes all of its
services, so what must not be seen by all cannot share one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from chorus.core.errors import ConfigError
from chorus.core.identity import AccessTable, Role
from chorus.transport.access import EVERY_ROLE, access_table, callers_table, fixed_table
from chorus.transport.channel import check_insecure, parse_address
from chorus.transport.health import SERVICE as HEALTH
from chorus.transport.health import Health, HealthServicer
from chorus.transport.interceptor import CallObserver, MeshInterceptor
from chorus.transport.open_calls import OpenCalls
from chorus.transport.options import (
    CALLER_LIMITS,
    CALLS_PER_CALLER,
    OPEN_LIMITS,
    SLOW_READER_S,
    idle_limit,
    server_options,
)
from chorus.transport.slow_readers import SlowReaders
from chorus.transport.standing import CertificateStanding, Standing
from chorus.transport.tls import TlsIdentity

_REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
_CHANNELZ = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"]
# The library has v1alpha only. v1 has the same messages under another package, so the same servicer answers both.
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
_REFLECTION_METHOD = "ServerReflectionInfo"
_REFLECTION_V1_PATH = f"/{_REFLECTION_V1}/{_REFLECTION_METHOD}"
_ADMIN_ACCESS: AccessTable = {
    **fixed_table(frozenset({Role.ADMIN}), _CHANNELZ, _REFLECTION, HEALTH),
    _REFLECTION_V1_PATH: frozenset({Role.ADMIN}),
}


@dataclass(frozen=True, slots=True)
class Service:
    """One service to serve: its descriptor, the generated `add_..._to_server`, and what implements it."""

    descriptor: ServiceDescriptor
    add: Callable[[Any, grpc.aio.Server], None]
    servicer: Any


class MeshServer:
    """The servers of one process; made by `build_server`. Nothing listens before `start()`."""

    def __init__(
        self,
        *,
        identity: TlsIdentity | None,
        listen: Sequence[str],
        services: Sequence[Service],
        open_listen: str | None,
        open_services: Sequence[Service],
        callers_listen: str | None,
        callers: Standing | None,
        health_listen: str | None,
        admin_listen: str | None,
        observer: CallObserver | None,
        extra_access: AccessTable,
        options: Iterable[tuple[str, str | int]],
        max_calls_per_caller: int,
        slow_reader_s: float,
    ) -> None:
        self.health = Health(service.descriptor.full_name for service in services)
        self._identity = identity
        self._listen = tuple(listen)
        self._services = tuple(services)
        self._open_listen = open_listen
        self._open_services = tuple(open_services)
        self._callers_listen = callers_listen
        self._health_listen = health_listen
        self._admin_listen = admin_listen
        self._options = server_options(options)
        most = max_calls_per_caller
        self._open_calls = OpenCalls(CertificateStanding(identity), most=most) if identity is not None else None
        self._caller_calls = OpenCalls(callers, most=most) if callers is not None else None
        self._observer = observer
        self.access: AccessTable = {
            **access_table(*(service.descriptor for service in services)),
            **fixed_table(EVERY_ROLE, HEALTH, _REFLECTION),
            _REFLECTION_V1_PATH: EVERY_ROLE,
            **extra_access,
        }
        self._slow_readers = SlowReaders(slow_reader_s)
        self._interceptor = MeshInterceptor(
            self.access, open_calls=self._open_calls, observer=observer, slow_readers=self._slow_readers
        )
        self._servers: list[grpc.aio.Server] = []
        self.addresses: tuple[str, ...] = ()
        self.open_address: str | None = None
        self.callers_address: str | None = None
        self.health_address: str | None = None
        self.admin_address: str | None = None

    @property
    def port(self) -> int:
        """The port of the first mesh address; known once started."""
        return parse_address(self.addresses[0]).port

    @property
    def side_addresses(self) -> Mapping[str, str]:
        """The bound health, admin, open and callers' listeners by kind, where there are any."""
        sides = {
            "health": self.health_address,
            "admin": self.admin_address,
            "open": self.open_address,
            "callers": self.callers_address,
        }
        return {kind: address for kind, address in sides.items() if address is not None}

    @property
    def calls_in_flight(self) -> int:
        """How many calls of the mesh listener are being handled, watches included."""
        return self._interceptor.calls_in_flight

    async def start(self) -> None:
        """Binds every address and serves. Raises ConfigError naming one that cannot be had; nothing serves then."""
        try:
            mesh = self._server(self._interceptor)
            self.addresses = tuple(_bind(mesh, address, self._identity) for address in self._listen)
            for service in self._services:
                service.add(service.servicer, mesh)
            health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(self.health), mesh)
            _add_reflection(mesh, [*(service.descriptor for service in self._services), HEALTH])
            if self._open_listen is not None:
                self._start_open(self._open_listen)
            if self._callers_listen is not None:
                self._start_callers(self._callers_listen)
            if self._admin_listen is not None:
                admin = self._server(MeshInterceptor(_ADMIN_ACCESS, open_calls=self._open_calls))
                self.admin_address = _bind(admin, self._admin_listen, self._identity)
                channelz.add_channelz_servicer(admin)
                health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(self.health), admin)
                _add_reflection(admin, [_CHANNELZ, HEALTH])
            if self._health_listen is not None:
                probe = self._server(MeshInterceptor(fixed_table(EVERY_ROLE, HEALTH), open_calls=None))
                self.health_address = _bind(probe, self._health_listen, None)
                health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(self.health), probe)
            for server in self._servers:
                await server.start()
        except BaseException:
            await self.stop(0)
            raise

    def drain(self) -> None:
        """Says NOT_SERVING to whoever asks or watches; calls go on. Stop when those that matter have ended."""
        self.health.drain()

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, gives those in flight `grace_s` seconds, then cancels them. May be called again."""
        self.health.drain()
        self.health.close()
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        self._servers.clear()
        self._slow_readers.close()
        for calls in (self._open_calls, self._caller_calls):
            if calls is not None:
                calls.close()

    async def wait_stopped(self) -> None:
        """Returns when the mesh listener has stopped."""
        if self._servers:
            await self._servers[0].wait_for_termination()

    def _start_open(self, address: str) -> None:
        """Binds the listener for callers without a certificate: nothing else is on it, and little fits through it."""
        table = access_table(*(service.descriptor for service in self._open_services))
        server = self._server(MeshInterceptor(table, open_calls=None, observer=self._observer), *OPEN_LIMITS)
        self.open_address = _bind(server, address, self._identity, asks_for_certificates=False)
        for service in self._open_services:
            service.add(service.servicer, server)

    def _start_callers(self, address: str) -> None:
        """Binds the listener for callers with keys: the services of the mesh, some of whose RPCs they may call."""
        descriptors = [service.descriptor for service in self._services]
        beside = {**fixed_table(EVERY_ROLE, HEALTH, _REFLECTION), _REFLECTION_V1_PATH: EVERY_ROLE}
        table = {**callers_table(*descriptors), **beside}
        interceptor = MeshInterceptor(
            table, open_calls=self._caller_calls, observer=self._observer, slow_readers=self._slow_readers
        )
        server = self._server(interceptor, *CALLER_LIMITS)
        self.callers_address = _bind(server, address, self._identity, asks_for_certificates=False)
        for service in self._services:
            service.add(service.servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(self.health), server)
        _add_reflection(server, [*descriptors, HEALTH])

    def _server(self, interceptor: MeshInterceptor, *limits: tuple[str, str | int]) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[interceptor], options=(*self._options, *limits))
        self._servers.append(server)
        return server


def build_server(
    *,
    identity: TlsIdentity | None,
    listen: Sequence[str],
    services: Sequence[Service],
    open_listen: str | None = None,
    open_services: Sequence[Service] = (),
    callers_listen: str | None = None,
    callers: Standing | None = None,
    health_listen: str | None = None,
    admin_listen: str | None = None,
    observer: CallObserver | None = None,
    insecure_loopback: bool = False,
    extra_access: AccessTable | None = None,
    options: Iterable[tuple[str, str | int]] = (),
    max_calls_per_caller: int = CALLS_PER_CALLER,
    slow_reader_s: float = SLOW_READER_S,
    idle_connection_s: float | None = None,
) -> MeshServer:
    """Returns the servers of a process, not yet started.

    `listen`: addresses (`host:port`, port 0 for a free one) of the mesh listener, over mutual TLS, with health and
    reflection beside `services`. Who may call what is read from the services' descriptors; `extra_access` adds RPCs
    whose protos do not say it. `open_listen`: over TLS in which no caller shows a certificate, `open_services` and
    nothing else. `callers_listen`: over TLS, for those whom `callers` knows by something else than a certificate; of
    `services` they may call what the protos say. `health_listen`: plaintext, grpc.health.v1 and nothing else, for
    probes without a certificate. `admin_listen`: channelz, for the admin role alone. Without an identity all is
    plaintext, which is allowed on loopback addresses alone, and only if `insecure_loopback` says so; everybody may call
    everything then.
    `max_calls_per_caller`: what a caller has open beyond that is refused, whatever it is and over how many connections.
    `slow_reader_s`: a stream whose next message waits longer than that for its reader is ended. `idle_connection_s`:
    a connection on which no call is open is closed after that.
    Raises ConfigError.
    """
    if not listen:
        raise ConfigError("a server needs an address to listen on")
    if callers_listen is not None and (callers is None or identity is None):
        raise ConfigError("callers with API keys are served over TLS alone: leave out mesh.insecure_loopback")
    sides = (admin_listen, health_listen, open_listen, callers_listen)
    for address in (*listen, *(extra for extra in sides if extra is not None)):
        parse_address(address)
        if identity is None and address != health_listen:
            check_insecure(address, insecure_loopback)
    return MeshServer(
        identity=identity,
        listen=listen,
        services=services,
        open_listen=open_listen,
        open_services=open_services,
        callers_listen=callers_listen,
        callers=callers,
        health_listen=health_listen,
        admin_listen=admin_listen,
        observer=observer,
        extra_access=extra_access if extra_access is not None else {},
        options=(*options, *(() if idle_connection_s is None else idle_limit(idle_connection_s))),
        max_calls_per_caller=max_calls_per_caller,
        slow_reader_s=slow_reader_s,
    )


def _bind(
    server: grpc.aio.Server, address: str, identity: TlsIdentity | None, *, asks_for_certificates: bool = True
) -> str:
    host, wanted = parse_address(address).host, parse_address(address).port
    try:
        if identity is None:
            port = server.add_insecure_port(address)
        else:
            # Credentials of their own for each port: the library asks those that follow a change once, at the bind.
            port = server.add_secure_port(
                address, identity.server_credentials(clients_show_certificates=asks_for_certificates)
            )
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: {_why_not(host, wanted)}") from error
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _why_not(host: str, port: int) -> str:
    """Returns why the address cannot be bound, which gRPC keeps to itself."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"another process listens on port {port} already"
        if error.errno == errno.EADDRNOTAVAIL:
            return f"{host} is not an address of this machine"
        if error.errno == errno.EACCES:
            return f"this user may not listen on port {port}; ports from 1024 are free to everybody"
        return error.strerror or str(error)
    return "the port is taken, or was until a moment ago"


class _Symbols:
    """The pools of descriptors, as reflection asks them: the common one first, then those of services that have their
    own. The library's own class finds no methods and no fields of messages, for which `grpcurl describe` asks.
    """

    def __init__(self, services: Iterable[ServiceDescriptor]) -> None:
        common = descriptor_pool.Default()
        own = {id(service.file.pool): service.file.pool for service in services}
        self._pools = [common, *(pool for pool in own.values() if pool is not common)]

    def __getattr__(self, name: str) -> Any:
        return getattr(descriptor_pool.Default(), name)

    def FindFileByName(self, name: str) -> Any:  # noqa: N802 - the library's names
        """Returns the file of that name. Raises KeyError."""
        for pool in self._pools:
            with contextlib.suppress(KeyError):
                return pool.FindFileByName(name)
        raise KeyError(name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:  # noqa: N802
        """Returns the file that defines `symbol`. Raises KeyError."""
        owner, _, member = symbol.rpartition(".")
        for pool in self._pools:
            with contextlib.suppress(KeyError):
                return pool.FindFileContainingSymbol(symbol)
            for find, members in (
                (pool.FindServiceByName, "methods_by_name"),
                (pool.FindMessageTypeByName, "fields_by_name"),
            ):
                with contextlib.suppress(KeyError):
                    found = find(owner)
                    if member in getattr(found, members):
                        return found.file
        raise KeyError(symbol)


def _add_reflection(server: grpc.aio.Server, services: Sequence[ServiceDescriptor]) -> None:
    names = [*(service.full_name for service in services), _REFLECTION.full_name]
    servicer = reflection.aio.ReflectionServicer(names, pool=_Symbols(services))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_REFLECTION_V1, {_REFLECTION_METHOD: handler}),)
    )
