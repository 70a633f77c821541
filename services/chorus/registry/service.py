"""A registry that serves: the board, its sweep, and the gRPC servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry

from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.config import ChorusConfig
from chorus.core.errors import ChorusError, InternalError
from chorus.core.fleet.claims import NodeClaims
from chorus.registry.board import LeaseBoard
from chorus.registry.servicer import RegistryServicer
from chorus.telemetry.lease_metrics import LeaseMetrics
from chorus.telemetry.metrics import RpcMetrics
from chorus.transport import Service, TlsIdentity, build_server
from chorus.transport.process import HostedService

DESCRIPTOR = registry_pb2.DESCRIPTOR.services_by_name["Registry"]


class RegistryService(HostedService):
    """One life of a registry; everything that it knows is gone with it.

    `epoch` None takes the wall clock's nanoseconds, which rise from one start to the next; watchers only ask whether an
    epoch is still the same, so a clock that was put back does no harm. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        config: ChorusConfig,
        *,
        identity: TlsIdentity | None,
        metrics: CollectorRegistry | None = None,
        epoch: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        registry = metrics if metrics is not None else CollectorRegistry()
        settings = config.registry
        self.board = LeaseBoard(
            epoch=time.time_ns() if epoch is None else epoch,
            ttl_s=settings.lease_ttl_s,
            flush_interval_s=settings.watch_flush_interval_s,
            clock=clock,
            metrics=LeaseMetrics(registry, clock=clock),
            claims=NodeClaims.ANY if identity is None else NodeClaims(settings.node_claims),
        )
        servicer = RegistryServicer(self.board, heartbeat_interval_s=settings.heartbeat_interval_s)
        self._server = build_server(
            identity=identity,
            listen=[str(settings.listen)],
            services=[Service(DESCRIPTOR, registry_pb2_grpc.add_RegistryServicer_to_server, servicer)],
            health_listen=None if settings.health_listen is None else str(settings.health_listen),
            admin_listen=None if settings.admin_listen is None else str(settings.admin_listen),
            observer=RpcMetrics(registry),
            insecure_loopback=config.mesh.insecure_loopback,
            max_calls_per_caller=config.mesh.max_calls_per_caller,
            slow_reader_s=config.mesh.slow_reader_s,
            idle_connection_s=config.mesh.idle_connection_s,
        )
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Where it serves, as `host:port`; known once started."""
        return self._server.addresses[0]

    @property
    def side_addresses(self) -> Mapping[str, str]:
        """Its health and admin listeners, where it has them."""
        return self._server.side_addresses

    async def start(self) -> None:
        """Serves. Raises ConfigError where an address cannot be had."""
        await self._server.start()
        self._sweeping = asyncio.create_task(self.board.sweep(), name="lease-sweep")
        self._server.health.set_serving(True)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends every watch with UNAVAILABLE, and serves no more. May be called again."""
        self._server.drain()
        self.board.close()
        await self._server.stop(max(grace_s, _ENDING_S))
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait({self._sweeping})

    async def wait_failed(self) -> ChorusError:
        """Returns if the sweep ends: leases would live for ever."""
        assert self._sweeping is not None, "not started"
        await asyncio.wait({self._sweeping})
        return InternalError(f"the sweep of leases ended: {self._sweeping!r}")


_ENDING_S = 1.0
"""What ending the watches may take before their connections are cut."""
