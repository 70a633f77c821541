"""Meeting a service of a mesh whose authority is known by its fingerprint alone: a handshake, and nothing else."""

from __future__ import annotations

import hashlib
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography import x509

from chorus.config.address import Endpoint
from chorus.core.errors import CertificateError, UnavailableError
from chorus.core.identity import Role, SpiffeId
from chorus.transport.tls import spiffe_id_of

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Met:
    """A service as its handshake showed it: its authority, who it is, and our own address towards it."""

    authority: x509.Certificate
    server: SpiffeId
    own_ip: str


def meet(where: Endpoint, authority_sha256: bytes, role: Role = Role.IDENTITY) -> Met:
    """Shakes hands with a service, and makes sure that it shows that authority. Nothing else is sent.

    Raises UnavailableError, CertificateError where another authority is shown, somebody else than a `role` answers, or
    this machine's clock is wrong.
    """
    chain, own_ip = _handshake(where)
    try:
        shown = [x509.load_der_x509_certificate(der) for der in chain]
    except ValueError:
        shown = []
    found = [one for der, one in zip(chain, shown, strict=False) if hashlib.sha256(der).digest() == authority_sha256]
    if not shown or not found:
        what, fix = ("token", "get a token") if role is Role.IDENTITY else ("fingerprint", "ask for its fingerprint")
        raise CertificateError(
            f"{where.authority} is not the mesh that the {what} is of: its authority has another fingerprint. "
            f"Check HOST:PORT; if it is right, somebody stands in between, or the mesh has a new authority: {fix}"
        )
    now = datetime.now(UTC)
    for certificate in (shown[0], found[0]):
        if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
            raise CertificateError(
                f"by this machine's clock it is {now:%Y-%m-%d %H:%M} UTC, and the certificate of {where.authority} is "
                f"valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
                f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; set the clock, here or there"
            )
    server = spiffe_id_of(shown[0])
    if server.role is not role:
        called = "identity service" if role is Role.IDENTITY else str(role)
        raise CertificateError(f"{where.authority} is {server}, and no {called}; check HOST:PORT")
    return Met(found[0], server, own_ip)


def _handshake(where: Endpoint) -> tuple[list[bytes], str]:
    """The certificates that are shown there (DER), unverified, and the address by which we came."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # what is shown is compared with a fingerprint, and nothing is sent
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((where.host, where.port), timeout=_TIMEOUT_S) as plain,
            context.wrap_socket(plain) as tls,
        ):
            return _shown_chain(tls), str(tls.getsockname()[0])
    except ssl.SSLError as error:
        raise UnavailableError(
            f"{where.authority} answers, but not as a mesh does ({error.reason or error}); is that the right port?"
        ) from error
    except OSError as error:
        why = error.strerror or str(error) or "no answer in time"
        raise UnavailableError(
            f"{where.authority} can't be reached ({why}); is the mesh up, and does a firewall let this machine through?"
        ) from error


def _shown_chain(connection: Any) -> list[bytes]:
    """All certificates that the other side showed. Public from Python 3.13 on; there before, under another name."""
    if hasattr(connection, "get_unverified_chain"):
        return list(connection.get_unverified_chain())
    return [ssl.PEM_cert_to_DER_cert(one.public_bytes()) for one in connection._sslobj.get_unverified_chain()]
