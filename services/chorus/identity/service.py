"""An identity service that serves: the office, its two listeners, and its own certificate."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from cryptography import x509
from prometheus_client import CollectorRegistry

from chorus.api.identity.v1 import identity_pb2 as pb
from chorus.api.identity.v1 import identity_pb2_grpc
from chorus.config import ChorusConfig, Endpoint
from chorus.core.errors import CertificateError, ChorusError, ConfigError, InternalError
from chorus.core.identity import Role
from chorus.core.identity.attempts import Attempts
from chorus.core.identity.renewal import due_at
from chorus.identity.office import Office
from chorus.identity.policy import load_policy
from chorus.identity.servicer import EnrolmentServicer, IdentityServicer
from chorus.store.audit_log import open_trail
from chorus.telemetry.logs import get_logger
from chorus.telemetry.metrics import RpcMetrics
from chorus.transport import Service, TlsIdentity, build_server
from chorus.transport.process import HostedService

IDENTITY = pb.DESCRIPTOR.services_by_name["Identity"]
ENROLMENT = pb.DESCRIPTOR.services_by_name["Enrolment"]
LEDGER_FILE = "identity.json"
AUDIT_FOLDER = "audit"

_LOOK_S = 1.0
_ENDING_S = 1.0

_log = get_logger()


class IdentityService(HostedService):
    """The one process that has the authority's key, in `mesh.certs_dir`. `wall` is seconds since 1970.

    Raises CertificateError where there is no authority, ConfigError for a damaged ledger or a mesh without TLS.
    """

    def __init__(
        self,
        config: ChorusConfig,
        *,
        metrics: CollectorRegistry | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        if config.mesh.insecure_loopback:
            raise ConfigError("mesh.insecure_loopback: in a mesh without certificates nobody need join")
        settings = self._settings = config.identity
        directory = config.mesh.certs_dir
        ledger = settings.ledger if settings.ledger is not None else directory / LEDGER_FILE
        self._trail = open_trail(config.audit, f"{Role.IDENTITY}-{settings.name}", beside=ledger.parent / AUDIT_FOLDER)
        self.office = Office(
            directory,
            ledger,
            load_policy(),
            lifetime=timedelta(seconds=settings.leaf_lifetime_s),
            wall=wall,
            trail=self._trail,
        )
        self.identity = self._own_identity()
        self.identity.revoke(self.office.ledger.revocations)
        self.office.on_change(self._follow_office)
        attempts = Attempts(burst=max(1, round(2 * settings.joins_per_minute)), per_s=settings.joins_per_minute / 60)
        self._admins = IdentityServicer(self.office, lambda: self._join_endpoint().authority)
        enrolment = EnrolmentServicer(self.office, attempts, self._endpoints)
        self._server = build_server(
            identity=self.identity,
            listen=[str(settings.listen)],
            services=[Service(IDENTITY, identity_pb2_grpc.add_IdentityServicer_to_server, self._admins)],
            open_listen=str(settings.join_listen),
            open_services=[Service(ENROLMENT, identity_pb2_grpc.add_EnrolmentServicer_to_server, enrolment)],
            health_listen=None if settings.health_listen is None else str(settings.health_listen),
            admin_listen=None if settings.admin_listen is None else str(settings.admin_listen),
            observer=RpcMetrics(metrics if metrics is not None else CollectorRegistry()),
            max_calls_per_caller=config.mesh.max_calls_per_caller,
            slow_reader_s=config.mesh.slow_reader_s,
            idle_connection_s=config.mesh.idle_connection_s,
        )
        self._renewing: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Where admins and services find it, as `host:port`; known once started."""
        return self._server.addresses[0]

    @property
    def join_address(self) -> str:
        """Where machines join; known once started."""
        assert self._server.open_address is not None
        return self._server.open_address

    @property
    def side_addresses(self) -> Mapping[str, str]:
        """Its other listeners by kind."""
        return self._server.side_addresses

    async def start(self) -> None:
        """Serves. Raises ConfigError where an address cannot be had."""
        await self._server.start()
        self._renewing = asyncio.create_task(self._keep_own_leaf(), name="own certificate")
        self._server.health.set_serving(True)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends every watch with UNAVAILABLE, and serves no more. May be called again."""
        self._server.drain()
        self._admins.close()
        await self._server.stop(max(grace_s, _ENDING_S))
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait({self._renewing})
        self._trail.close()

    async def wait_failed(self) -> ChorusError:
        """Returns if its own certificate is renewed no more."""
        assert self._renewing is not None, "not started"
        await asyncio.wait({self._renewing})
        return InternalError(f"the identity service renews its own certificate no more: {self._renewing!r}")

    def _own_identity(self) -> TlsIdentity:
        leaf, shown = self.office.own_leaf(self._settings.name), self.office.shown_authority
        # The authority's certificate goes with it, so that a machine that joins can compare its fingerprint.
        return TlsIdentity(
            self.office.authorities_pem,
            leaf.cert_pem + shown.certificate_pem,
            leaf.key_pem,
            leaf.spiffe_id,
            leaf.not_after,
        )

    async def _keep_own_leaf(self) -> None:
        jitter = random.Random().random()
        while True:
            try:
                self.office.advance()
            except CertificateError as error:
                _log.error("authority.not_rotated", why=error.message)
            leaf = x509.load_pem_x509_certificate(self.identity.cert_pem)
            due = due_at(leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp(), jitter)
            if self.office.now >= due or self.identity.ca_pem != self.office.authorities_pem:
                self._renew_own_leaf()
            await asyncio.sleep(_LOOK_S)

    def _renew_own_leaf(self) -> None:
        self.identity.renew(self._own_identity())
        _log.info("certificate.renewed", until=self.identity.not_after.isoformat())

    def _follow_office(self) -> None:
        """Shows and believes what the office does from now on."""
        self.identity.revoke(self.office.ledger.revocations)
        if self.identity.ca_pem != self.office.authorities_pem:
            self._renew_own_leaf()

    def _join_endpoint(self) -> Endpoint:
        return self._settings.advertise_join or Endpoint.parse(self.join_address)

    def _endpoints(self) -> pb.MeshEndpoints:
        own = self._settings.advertise or Endpoint.parse(self.address)
        return pb.MeshEndpoints(
            registries=map(str, self._settings.registries),
            coordinators=map(str, self._settings.coordinators),
            identity=str(own.named(self._settings.name)),
        )
