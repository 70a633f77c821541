"""What a client without a certificate shows: a key or a token, to a server whose authority it knows."""

from __future__ import annotations

import binascii
import re
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.serialization import Encoding

from chorus.config.address import Endpoint
from chorus.core.errors import CertificateError, ConfigError
from chorus.core.identity import Role
from chorus.transport.meeting import meet
from chorus.transport.tls import authority_trust_domain, open_to_all, read_certificates, read_file

_MAX_BYTES = 16 * 1024
_FINGERPRINT = re.compile(r"(sha256:)?([0-9a-f]{2}:?){32}", re.IGNORECASE)


class Bearer:
    """A key in a file, which is read anew for each call, so that a token may be replaced there."""

    def __init__(self, key_file: Path, ca_pem: bytes, trust_domain: str) -> None:
        """`ca_pem` are the authorities of the mesh whose trust domain that is.

        Raises ConfigError where the file holds no key, or every user of the machine may read it.
        """
        self.trust_domain = trust_domain
        self._file = key_file
        self._ca_pem = ca_pem
        if open_to_all(key_file):
            raise ConfigError(f"{key_file} can be read by every user of this machine; run `chmod 600 {key_file}`")
        self.text()

    @classmethod
    def known_by(cls, key_file: Path, ca: str, coordinator: Endpoint) -> Bearer:
        """`ca` is a file of authorities, or one's SHA-256 fingerprint, by which the coordinator is met once.

        Raises ConfigError, CertificateError, UnavailableError.
        """
        if _FINGERPRINT.fullmatch(ca):
            digest = binascii.unhexlify(re.sub("^sha256:|:", "", ca.lower()))
            met = meet(coordinator, digest, Role.COORDINATOR)
            return cls(key_file, met.authority.public_bytes(Encoding.PEM), met.server.trust_domain)
        path = Path(ca).expanduser()
        pem = read_file(path)
        return cls(key_file, pem, authority_trust_domain(read_certificates(pem, path.name)[0]))

    def text(self) -> str:
        """The key as it is now. Raises ConfigError, which shows none of it."""
        try:
            with self._file.open("rb") as stream:
                content = stream.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"cannot read {self._file}: {error.strerror}") from error
        text = content.decode("ascii", "replace").strip()
        if not text or len(content) > _MAX_BYTES or not all("!" <= character <= "~" for character in text):
            raise ConfigError(f"{self._file} should hold one line, an API key or a token, and nothing else")
        return text

    def credentials(self) -> grpc.ChannelCredentials:
        """With these a channel shows the key with every call, to nobody but whom the authorities vouch for."""
        return grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(self._ca_pem), grpc.metadata_call_credentials(_Shown(self), name="bearer")
        )


class _Shown(grpc.AuthMetadataPlugin):
    """Adds the key to a call; on a thread of the library's."""

    def __init__(self, bearer: Bearer) -> None:
        self._bearer = bearer

    def __call__(self, context: object, callback: grpc.AuthMetadataPluginCallback) -> None:  # noqa: ARG002
        try:
            callback((("authorization", f"Bearer {self._bearer.text()}"),), None)
        except (ConfigError, CertificateError) as error:
            callback((), error)
