"""This process's own certificate, read from the directory that `chorus certs issue` made, or a Kubernetes secret."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization

from chorus.core.errors import CertificateError, InvalidRequestError
from chorus.core.identity import SpiffeId
from chorus.core.identity.revocations import NOTHING, Revocations
from chorus.core.identity.spiffe import check_trust_domain, node_in

CA_FILE = "ca.crt"
CERTIFICATE_FILE = "tls.crt"
KEY_FILE = "tls.key"


@dataclass(frozen=True, slots=True)
class _Files:
    """What a process shows and believes at one time."""

    ca_pem: bytes
    cert_pem: bytes
    key_pem: bytes = field(repr=False)
    not_after: datetime


class TlsIdentity:
    """Who this process is, and how it proves it. All PEM; `ca_pem` are the authorities that it trusts.

    Who it is stays; its certificate is replaced while it is in use (`renew`), and so is the list of those that are not
    to be believed (`revoke`). Servers show the new one to whoever connects from then on, and channels of
    `open_channel` go over to new connections. Use it from one event loop.
    """

    def __init__(
        self, ca_pem: bytes, cert_pem: bytes, key_pem: bytes, spiffe_id: SpiffeId, not_after: datetime
    ) -> None:
        self.spiffe_id = spiffe_id
        self._files = _Files(ca_pem, cert_pem, key_pem, not_after)
        self._revoked = NOTHING
        self._listeners: set[Callable[[], None]] = set()

    def __repr__(self) -> str:
        return f"TlsIdentity({self.spiffe_id}, until {self.not_after})"

    @property
    def ca_pem(self) -> bytes:
        """The authorities that it trusts."""
        return self._files.ca_pem

    @property
    def cert_pem(self) -> bytes:
        """Its certificate, and those between it and an authority."""
        return self._files.cert_pem

    @property
    def key_pem(self) -> bytes:
        """Its private key."""
        return self._files.key_pem

    @property
    def not_after(self) -> datetime:
        """When its certificate ends."""
        return self._files.not_after

    @property
    def node(self) -> str | None:
        """The node that its certificate is for, where it names one."""
        nodes = nodes_of(read_certificates(self.cert_pem, CERTIFICATE_FILE)[0], self.spiffe_id.trust_domain)
        return next(iter(nodes)) if len(nodes) == 1 else None

    @property
    def revoked(self) -> Revocations:
        """Who is not to be believed, as far as this process has heard."""
        return self._revoked

    def renew(self, newer: TlsIdentity) -> None:
        """Takes over the files of `newer`. Raises CertificateError where those are somebody else's."""
        if newer.spiffe_id != self.spiffe_id:
            raise CertificateError(
                f"the new certificate is that of {newer.spiffe_id}, and this process is {self.spiffe_id}"
            )
        if newer._files != self._files:
            self._files = newer._files
            self._tell()

    def revoke(self, revocations: Revocations) -> None:
        """Takes over a list of who is not to be believed; open calls of those in it end."""
        if revocations != self._revoked:
            self._revoked = revocations
            self._tell()

    def on_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener` after each change, until what is returned is called."""
        self._listeners.add(listener)
        return lambda: self._listeners.discard(listener)

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    @classmethod
    def load(cls, directory: Path, *, now: datetime | None = None, even_ended: bool = False) -> TlsIdentity:
        """Reads `tls.crt`, `tls.key` and `ca.crt` from `directory`; `even_ended`: whatever the certificate's dates.

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
        problem = date_problem(leaf, now if now is not None else datetime.now(UTC))
        if problem and not even_ended:
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

    def server_credentials(self, *, clients_show_certificates: bool = True) -> grpc.ServerCredentials:
        """What a server shows; every client must have a certificate of the same authorities, or is asked for none.

        To those who are asked for none the authorities are shown, too: they may know one by its fingerprint alone.
        """
        shown = self._files

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown  # asked for each connection, on a thread of the library's
            if (files := self._files) is shown:
                return None
            shown = files
            return configuration(files)

        def configuration(files: _Files) -> grpc.ServerCertificateConfiguration:
            whole = clients_show_certificates or files.ca_pem in files.cert_pem
            chain = files.cert_pem if whole else files.cert_pem + b"\n" + files.ca_pem
            return grpc.ssl_server_certificate_configuration([(files.key_pem, chain)], files.ca_pem)

        return grpc.dynamic_ssl_server_credentials(
            configuration(shown),
            changed,  # type: ignore[arg-type]  # None means no change, which the stubs don't know
            require_client_authentication=clients_show_certificates,
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


def fingerprint_of(pem: bytes) -> str:
    """The SHA-256 of the first certificate in `pem`, as people write it. Raises CertificateError."""
    return read_certificates(pem, CA_FILE)[0].fingerprint(hashes.SHA256()).hex()


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


def nodes_of(certificate: x509.Certificate, trust_domain: str) -> frozenset[str]:
    """Returns the ids of the nodes that the certificate puts its holder on; most certificates name none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return frozenset()
    found = (node_in(name, trust_domain) for name in names.get_values_for_type(x509.DNSName))
    return frozenset(node for node in found if node is not None)


def authority_trust_domain(certificate: x509.Certificate) -> str:
    """Returns the trust domain that an authority's certificate names. Raises CertificateError where it names none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    if len(uris) == 1 and uris[0].startswith("spiffe://"):
        domain = uris[0].removeprefix("spiffe://")
        try:
            check_trust_domain(domain)
        except InvalidRequestError as error:
            raise CertificateError(f"the authority's certificate names a bad trust domain: {error}") from error
        return domain
    raise CertificateError("the authority's certificate names no SPIFFE trust domain; it was not made by Chorus")


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
