"""Who is at the other end of a connection, as TLS has proved it."""

from __future__ import annotations

import ipaddress
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

import grpc
from cryptography import x509

from chorus.core.errors import CertificateError, UnauthenticatedError
from chorus.core.identity import SpiffeId
from chorus.transport.tls import nodes_of, spiffe_id_of

_TLS_1_3 = b"TLSv1.3"

_caller: ContextVar[Peer | None] = ContextVar("chorus_caller", default=None)


class Peer(NamedTuple):
    """Whom a connection's certificate names, and on which nodes; or whose key was shown, which has no `serial`.

    `not_after` is seconds since 1970.
    """

    spiffe_id: SpiffeId
    serial: int
    not_after: float
    nodes: frozenset[str] = frozenset()


def current_caller() -> SpiffeId | None:
    """Returns who made the call that is being handled; None on a plaintext listener, and outside any call."""
    peer = _caller.get()
    return None if peer is None else peer.spiffe_id


def caller_nodes() -> frozenset[str]:
    """Returns the nodes that the caller's certificate names; most name none."""
    peer = _caller.get()
    return frozenset() if peer is None else peer.nodes


def caller_host(context: Any) -> str:
    """Returns the IP address that a call comes from, the same one for every way to speak from the server's machine."""
    address = unquote(str(context.peer())).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return "loopback" if ip.is_loopback else str(ip)


def set_caller(caller: Peer | None) -> None:
    """Makes `caller` the current one of this task; the interceptor does so for every call."""
    _caller.set(caller)


def authenticate(context: grpc.aio.ServicerContext[Any, Any], trust_domain: str, now: float) -> Peer:
    """Returns who the caller is at `now` (seconds since 1970).

    Raises UnauthenticatedError where the connection is older than TLS 1.3 or its certificate names nobody of this mesh.
    The handshake has checked the signature; it checked the dates too, but a connection may outlive its certificate, so
    they are looked at again.
    """
    auth = context.auth_context()
    version = next(iter(auth.get("ssl_tls_version", ())), b"")
    # A library that does not tell its version is let pass; the one that we pin does.
    if version and version != _TLS_1_3:
        raise UnauthenticatedError(
            f"this mesh speaks TLS 1.3, and the caller {version.decode('ascii', 'replace')[:20]}"
        )
    pem = next(iter(auth.get("x509_pem_cert", ())), None)
    if pem is None:
        raise UnauthenticatedError("this mesh needs a certificate of its authority, and the caller showed none")
    try:
        peer = _read(pem)
    except (CertificateError, ValueError) as error:
        raise UnauthenticatedError(f"the caller's certificate gives no identity: {error}") from error
    if peer.spiffe_id.trust_domain != trust_domain:
        raise UnauthenticatedError(f"the caller, {peer.spiffe_id}, is of another mesh than this one, {trust_domain}")
    if now >= peer.not_after:
        raise UnauthenticatedError(f"the certificate of {peer.spiffe_id} has expired since this connection was made")
    return peer


@lru_cache(maxsize=1024)
def _read(pem: bytes) -> Peer:
    certificate = x509.load_pem_x509_certificate(pem)
    identity, until = spiffe_id_of(certificate), certificate.not_valid_after_utc.timestamp()
    return Peer(identity, certificate.serial_number, until, nodes_of(certificate, identity.trust_domain))
