"""What a listener of the mesh is like for who connects to it: seen from outside, not believed from its settings."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chorus.core.errors import CertificateError, UnavailableError
from chorus.core.identity import SpiffeId
from chorus.transport.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class TlsFacts:
    """One handshake. `peer` is the SPIFFE id that the listener proved; strangers are those without a certificate."""

    version: str
    cipher: str
    peer: str
    refuses_strangers: bool


def look(host: str, port: int, *, server: SpiffeId, identity: Path) -> TlsFacts:
    """Connects twice: with the certificate in the folder `identity`, and as a stranger without one. Blocks.

    Raises CertificateError where the listener is not `server`, UnavailableError where nobody listens.
    """
    known = _context(identity)
    known.load_cert_chain(identity / CERTIFICATE_FILE, identity / KEY_FILE)
    try:
        with _connect(host, port, known, server) as connection:
            names: Any = (connection.getpeercert() or {}).get("subjectAltName", ())
            uris = [value for kind, value in names if kind == "URI"]
            version, cipher = connection.version() or "", (connection.cipher() or ("",))[0]
    except ssl.SSLError as error:
        raise CertificateError(f"{host}:{port} is not {server}: {error.reason or error}") from error
    except OSError as error:
        raise UnavailableError(f"{host}:{port} cannot be reached: {error.strerror or error}") from error
    return TlsFacts(version, cipher, str(next(iter(uris), "")), _refuses_strangers(host, port, identity, server))


def _refuses_strangers(host: str, port: int, identity: Path, server: SpiffeId) -> bool:
    """Whether somebody without a certificate is sent away; with TLS 1.3 one learns that by the first read."""
    try:
        with _connect(host, port, _context(identity), server) as connection:
            return not connection.recv(1)
    except TimeoutError:
        return False
    except OSError:  # ssl.SSLError is one
        return True


def _context(identity: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(identity / CA_FILE)
    context.set_alpn_protocols(["h2"])
    return context


def _connect(host: str, port: int, context: ssl.SSLContext, server: SpiffeId) -> ssl.SSLSocket:
    raw = socket.create_connection((host, port), timeout=_TIMEOUT_S)
    try:
        return context.wrap_socket(raw, server_hostname=server.dns_name)
    except BaseException:
        raw.close()
        raise
