"""Keeping a process's certificate: renewed in time, taken over when its files are replaced; and who was revoked.

Three tasks that know nothing of each other. The files are whoever's: this process's own renewals, cert-manager's, or a
Kubernetes secret's. While the identity service is away, the certificate and the list of revocations stay what they are.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from google.protobuf.message import DecodeError

from chorus.api.identity.v1 import identity_pb2 as pb
from chorus.api.identity.v1 import identity_pb2_grpc
from chorus.config import Endpoint, MeshSettings
from chorus.core.errors import CertificateError, ChorusError, RenewalError, RevokedError
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.renewal import due_at, pause_s
from chorus.telemetry.logs import get_logger
from chorus.transport.calls import responses
from chorus.transport.channel import open_channel, open_channel_to_join
from chorus.transport.files import CERTIFICATE_MODE, KEY_MODE, write_new
from chorus.transport.process import leaf_folder, load_identity
from chorus.transport.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, TlsIdentity
from chorus.wire.errors import from_rpc_error
from chorus.wire.identity import decode_revocations, decode_time

REVOKED_FILE = "revoked.bin"

_LOOK_S = 1.0
_RENEW_DEADLINE_S = 10.0
_SILENCE_S = 5.0
_AGAIN_S = 0.5
_SKEW_S = 60.0

_log = get_logger()
_tasks: set[asyncio.Task[None]] = set()  # the event loop itself keeps none


async def keep_identity(mesh: MeshSettings, role: Role, name: str, *, node: str = "") -> TlsIdentity | None:
    """Returns who the process is that serves as `name`, and keeps its certificate for as long as the event loop runs.

    `node` is where it is, for a certificate that names no node yet. A certificate that has ended is renewed first,
    where the mesh has an identity service. None, and raises, as `load_identity`.
    """
    if mesh.insecure_loopback:
        return None
    directory = leaf_folder(mesh, role, name)
    try:
        identity = load_identity(mesh, role, name)
    except CertificateError:
        if mesh.renewal is None:
            raise
        identity = TlsIdentity.load(directory, even_ended=True)
        await CertificateKeeper(identity, directory, renewal=mesh.renewal, node=node).renew()
    assert identity is not None
    keeper = CertificateKeeper(identity, directory, renewal=mesh.renewal, service=mesh.identity_service, node=node)
    task = asyncio.create_task(keeper.run(), name="keep the certificate")
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return identity


class CertificateKeeper:
    """Keeps `identity`, whose files are in `directory`. `renewal` is where it renews, `service` where it learns who was
    revoked; `node` is where the process is, for a certificate that names no node yet. `wall` is seconds since 1970;
    `rng` spreads machines that joined together.
    """

    def __init__(
        self,
        identity: TlsIdentity,
        directory: Path,
        *,
        renewal: Endpoint | None = None,
        service: Endpoint | None = None,
        node: str = "",
        wall: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._identity = identity
        self._directory = directory
        self._renewal = renewal
        self._service = service
        self._node = node
        self._wall = wall
        self._rng = rng if rng is not None else random.Random()
        self._revoked_file = directory / REVOKED_FILE
        self._seen = self._stamp()  # now, for whatever comes later is newer than `identity`

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_files())
            if self._renewal is not None:
                group.create_task(self._renew_in_time())
            if self._service is not None:
                self._remember_revocations()
                group.create_task(self._follow_revocations(self._service))

    async def renew(self) -> None:
        """Renews now. Raises CertificateError where the files can't be written, and what the service answers."""
        assert self._renewal is not None
        leaf = x509.load_pem_x509_certificate(self._identity.cert_pem)
        request = pb.RenewRequest(
            certificate=leaf.public_bytes(serialization.Encoding.DER),
            certificate_request=certificate_request(self._identity.key_pem),
            node_id=self._node,
        )
        async with open_channel_to_join(
            self._renewal.authority, ca_pem=self._identity.ca_pem, server=self._server(self._renewal)
        ) as channel:
            stub: Any = identity_pb2_grpc.EnrolmentStub(channel)
            try:
                answer: pb.RenewResponse = await stub.Renew(request, timeout=_RENEW_DEADLINE_S)
            except grpc.RpcError as error:
                raise from_rpc_error(error, peer=f"the identity service {self._renewal}") from error
        self._take(answer.certificate)

    async def renew_if_ended(self) -> None:
        """Renews where the certificate can't be used any more. Raises as `renew`."""
        if self._renewal is not None and self._wall() >= self._identity.not_after.timestamp():
            await self.renew()

    def _take(self, issued: pb.IssuedCertificate) -> None:
        newer = TlsIdentity.from_pem(
            ca_pem=issued.authorities_pem, cert_pem=issued.certificate_pem, key_pem=self._identity.key_pem
        )
        # The authorities first: whoever reads in between finds a certificate that one of them has signed.
        for name, content in ((CA_FILE, newer.ca_pem), (CERTIFICATE_FILE, newer.cert_pem)):
            write_new(self._directory / name, content, CERTIFICATE_MODE, replace=True)
        self._identity.renew(newer)
        _log.info("certificate.renewed", identity=str(newer.spiffe_id), until=newer.not_after.isoformat())
        skew_s = decode_time(issued.time) - self._wall()
        if abs(skew_s) > _SKEW_S:
            _log.warning("clock.differs", by_s=round(skew_s), from_="the identity service", fix="set the clock")

    async def _renew_in_time(self) -> None:
        failures, jitter = 0, self._rng.random()
        while True:
            leaf = x509.load_pem_x509_certificate(self._identity.cert_pem)
            ends = leaf.not_valid_after_utc.timestamp()
            left_s = due_at(leaf.not_valid_before_utc.timestamp(), ends, jitter) - self._wall()
            if left_s > 0:
                # By the wall clock, and looked at again and again: a machine that slept wakes up late.
                await asyncio.sleep(min(left_s, _LOOK_S))
                continue
            try:
                await self.renew()
                failures = 0
            except ChorusError as error:
                failures += 1
                final = isinstance(error, RevokedError | RenewalError)
                tell = _log.error if final else _log.warning
                tell("certificate.not_renewed", reason=error.reason, why=error.message, tries=failures)
                await asyncio.sleep(pause_s(failures + 10 * final, ends - self._wall(), self._rng.random()))

    # --- files ------------------------------------------------------------------------------------------------------

    async def _follow_files(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            stamp = self._stamp()
            if stamp == self._seen:
                continue
            try:
                self._identity.renew(TlsIdentity.load(self._directory))
            except CertificateError as error:  # half written, or wrong; what there is goes on
                _log.warning("certificate.not_taken", why=error.message)
            else:
                _log.info("certificate.read", until=self._identity.not_after.isoformat())
            self._seen = stamp

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        stamps = []
        for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE):
            try:
                found = (self._directory / name).stat()
                stamps.append((found.st_ino, found.st_mtime_ns, found.st_size))
            except OSError:
                stamps.append((0, 0, 0))
        return tuple(stamps)

    # --- revocations ------------------------------------------------------------------------------------------------

    async def _follow_revocations(self, service: Endpoint) -> None:
        channel = open_channel(service.authority, identity=self._identity, server=self._server(service))
        told = ""
        async with channel:
            stub: Any = identity_pb2_grpc.IdentityStub(channel)
            while True:
                try:
                    await self._watch(stub)
                    problem = "it ended the watch"
                except TimeoutError:
                    problem = f"it said nothing for {_SILENCE_S:g} s"
                except ChorusError as error:
                    problem = error.message
                if problem != told:
                    _log.warning("revocations.unknown", service=str(service), why=problem)
                told = problem
                await asyncio.sleep(_AGAIN_S * (0.5 + self._rng.random()))

    async def _watch(self, stub: Any) -> None:
        messages = responses(stub.WatchRevocations(pb.WatchRevocationsRequest()), peer="the identity service")
        try:
            while True:
                async with asyncio.timeout(_SILENCE_S):
                    message = await anext(messages, None)
                if message is None:
                    return
                if message.HasField("list"):
                    self._learn(message)
        finally:
            await messages.aclose()  # type: ignore[attr-defined]

    def _learn(self, message: pb.WatchRevocationsResponse) -> None:
        revocations = decode_revocations(message.list.revocations, message.revision)
        if revocations == self._identity.revoked:
            return
        self._identity.revoke(revocations)
        _log.info("revocations.changed", revision=revocations.revision, count=len(revocations.entries))
        with suppress(CertificateError):  # a secret of Kubernetes can't be written to
            write_new(self._revoked_file, message.SerializeToString(), KEY_MODE, replace=True)

    def _remember_revocations(self) -> None:
        """What was known when the process ended: an identity service that is away lets nobody in again."""
        try:
            message = pb.WatchRevocationsResponse.FromString(self._revoked_file.read_bytes())
            self._identity.revoke(decode_revocations(message.list.revocations, message.revision))
        except FileNotFoundError:
            return
        except (OSError, DecodeError, ChorusError) as error:
            _log.warning("revocations.forgotten", file=str(self._revoked_file), why=str(error))

    def _server(self, endpoint: Endpoint) -> SpiffeId:
        return SpiffeId(self._identity.spiffe_id.trust_domain, Role.IDENTITY, endpoint.name or "identity")


def certificate_request(key_pem: bytes) -> bytes:
    """A PKCS #10 request (DER) for the key, signed with it. Who it is for is the mesh's to say, so it names nobody."""
    key: Any = serialization.load_pem_private_key(key_pem, password=None)
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)
