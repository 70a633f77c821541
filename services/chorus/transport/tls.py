"""This process's own certificate, read from the directory that `chorus certs issue` made, or a Kubernetes secret."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from chorus.core.errors import CertificateError, InvalidRequestError
from chorus.core.identity import SpiffeId

CA_FILE = "ca.crt"
CERTIFICATE_FILE = "tls.crt"
KEY_FILE = "tls.key"


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """Who this process is, and how it proves it. All PEM; `ca_pem` are the authorities that it trusts."""

    ca_pem: bytes
    cert_pem: bytes
    key_pem: bytes = field(repr=False)
    spiffe_id: SpiffeId
    not_after: datetime

    @classmethod
    def load(cls, directory: Path, *, now: datetime | None = None) -> TlsIdentity:
        """Reads `tls.crt`, `tls.key` and `ca.crt` from `directory`.

        Raises CertificateError, with the fix, where a file is missing or damaged, the key is not the certificate's or
        is open to every user of the machine, the certificate is not of this mesh, or it is not valid now.
        """
        if not directory.is_dir():
            raise CertificateError(
                f"there are no certificates in {directory}; `chorus up` makes those of a mesh on this machine, "
                "`chorus certs issue` those of another one, to be copied here"
            )
        if open_to_all(directory / KEY_FILE):
            raise CertificateError(
                f"{directory / KEY_FILE} can be read by every user of this machine; run "
                f"`chmod 600 {directory / KEY_FILE}` (in Kubernetes: defaultMode 0440 on the secret's volume)"
            )
        identity = cls.from_pem(
            ca_pem=read_file(directory / CA_FILE),
            cert_pem=read_file(directory / CERTIFICATE_FILE),
            key_pem=read_file(directory / KEY_FILE),
            where=str(directory),
        )
        leaf = read_certificates(identity.cert_pem, CERTIFICATE_FILE)[0]
        if problem := date_problem(leaf, now if now is not None else datetime.now(UTC)):
            raise CertificateError(f"the certificate in {directory} {problem}")
        return identity

    @classmethod
    def from_pem(cls, *, ca_pem: bytes, cert_pem: bytes, key_pem: bytes, where: str = "memory") -> TlsIdentity:
        """Returns the identity that these files hold, whatever their dates. Raises CertificateError."""
        try:
            chain = read_certificates(cert_pem, CERTIFICATE_FILE)
            authorities = read_certificates(ca_pem, CA_FILE)
            check_key(chain[0], key_pem)
            spiffe_id = spiffe_id_of(chain[0])
            check_chain(chain, authorities)
        except CertificateError as error:
            raise CertificateError(f"{where}: {error}") from error
        return cls(ca_pem, cert_pem, key_pem, spiffe_id, chain[0].not_valid_after_utc)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """What a client shows, and which authorities it believes."""
        return grpc.ssl_channel_credentials(self.ca_pem, self.key_pem, self.cert_pem)

    def server_credentials(self) -> grpc.ServerCredentials:
        """What a server shows; every client must have a certificate of the same authorities."""
        return grpc.ssl_server_credentials(
            [(self.key_pem, self.cert_pem)], root_certificates=self.ca_pem, require_client_auth=True
        )


def read_file(path: Path) -> bytes:
    """Returns what is in `path`. Raises CertificateError where it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CertificateError(f"{path} is missing; `chorus certs issue` makes it") from None
    except OSError as error:
        raise CertificateError(f"cannot read {path}: {error.strerror}") from error


def open_to_all(path: Path) -> bool:
    """Whether users other than the owner and its group may read `path`; never true where modes mean nothing."""
    try:
        return os.name == "posix" and bool(path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH))
    except OSError:
        return False


def read_certificates(pem: bytes, name: str) -> list[x509.Certificate]:
    """Returns the certificates in `pem`, at least one. Raises CertificateError calling the file `name`."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise CertificateError(f"{name} is damaged: it holds no PEM certificate") from error


def check_key(certificate: x509.Certificate, key_pem: bytes) -> None:
    """Raises CertificateError unless `key_pem` is the private key of `certificate`."""
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except TypeError as error:
        raise CertificateError(f"{KEY_FILE} is encrypted; a service has nobody to type its passphrase") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"{KEY_FILE} is damaged: it holds no PEM private key") from error
    if key.public_key() != certificate.public_key():
        raise CertificateError(f"{KEY_FILE} is not the key of {CERTIFICATE_FILE}; issue the pair anew")


def spiffe_id_of(certificate: x509.Certificate) -> SpiffeId:
    """Returns the one identity that `certificate` gives. Raises CertificateError where it gives none, or two."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    except ValueError as error:
        raise CertificateError("the certificate's extensions cannot be read") from error
    if len(uris) != 1:
        raise CertificateError(f"the certificate names {len(uris)} SPIFFE identities, not one; it is not of this mesh")
    try:
        return SpiffeId.parse(uris[0])
    except InvalidRequestError as error:
        raise CertificateError(f"the certificate's identity is not one of a mesh: {error}") from error


def check_chain(chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]) -> None:
    """Raises CertificateError unless each certificate of `chain` signed the one before it, an authority the last.

    Who signs must be allowed to: a leaf's key makes signatures as good as any other's.
    """
    for below, (lower, upper) in enumerate(itertools.pairwise(chain)):
        if not _signed(lower, upper):
            raise CertificateError(f"{CERTIFICATE_FILE}: the certificates in it do not follow from each other")
        _check_may_sign(upper, between=below)
    signers = [authority for authority in authorities if _signed(chain[-1], authority)]
    if not signers:
        raise CertificateError(
            f"{CERTIFICATE_FILE} was not signed by the authority in {CA_FILE}; "
            "copy all three files from one `chorus certs issue`"
        )
    for signer in signers:
        _check_may_sign(signer, between=len(chain) - 1)


def date_problem(certificate: x509.Certificate, now: datetime) -> str | None:
    """Returns what is wrong with a certificate's dates at `now`, with the fix, or None."""
    if now >= certificate.not_valid_after_utc:
        return (
            f"expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; "
            "issue it anew with `chorus certs issue --force`"
        )
    if now < certificate.not_valid_before_utc:
        return (
            f"is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
            f"{now:%Y-%m-%d %H:%M} UTC; set the clock"
        )
    return None


def _check_may_sign(signer: x509.Certificate, *, between: int) -> None:
    """Raises CertificateError unless `signer` is an authority, over `between` others down to the leaf (RFC 5280)."""
    try:
        basic = signer.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = signer.extensions.get_extension_for_class(x509.KeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        allowed = False
    else:
        deep_enough = basic.path_length is None or basic.path_length >= between
        allowed = basic.ca and deep_enough and usage.key_cert_sign
    if not allowed:
        raise CertificateError(
            f"{CERTIFICATE_FILE} was signed by {signer.subject.rfc4514_string()}, which may sign no certificates; "
            "somebody may have used the key of another service to make it"
        )


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
