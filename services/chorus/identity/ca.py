"""The certificate authority of a mesh, kept in a directory.

ca.crt, ca.key              the authority; ca.key never leaves the machine where it was made
<role>-<name>/tls.crt       a leaf; the three names are those of a Kubernetes TLS secret
<role>-<name>/tls.key
<role>-<name>/ca.crt
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from chorus.core.errors import CertificateError, InvalidRequestError
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.spiffe import check_trust_domain, node_dns_name, node_zone
from chorus.identity.policy import Policy
from chorus.transport.files import CERTIFICATE_MODE, KEY_MODE, make_directory, write_new, write_new_directory
from chorus.transport.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, authority_trust_domain, date_problem

CA_KEY = "ca.key"

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One issued certificate with its key, all PEM."""

    spiffe_id: SpiffeId
    not_after: datetime
    ca_pem: bytes
    cert_pem: bytes
    key_pem: bytes = field(repr=False)

    def write(self, directory: Path, *, replace: bool = False) -> Path:
        """Writes the three files to `<directory>/<role>-<name>` and returns that path. Raises CertificateError."""
        make_directory(directory)
        path = leaf_directory(directory, self.spiffe_id)
        contents = {
            KEY_FILE: (self.key_pem, KEY_MODE),
            CERTIFICATE_FILE: (self.cert_pem, CERTIFICATE_MODE),
            CA_FILE: (self.ca_pem, CERTIFICATE_MODE),
        }
        write_new_directory(path, contents, replace=replace)
        return path


def leaf_directory(directory: Path, identity: SpiffeId) -> Path:
    """Returns where the leaf of `identity` is kept."""
    return directory / f"{identity.role}-{identity.name}"


class CertificateAuthority:
    """Signs leaves of one trust domain. The key is an EC P-256 one, in memory for as long as this object lives.

    While one authority takes over from another, holders of its leaves are to believe the `others`, too.
    """

    def __init__(
        self,
        certificate: x509.Certificate,
        key: ec.EllipticCurvePrivateKey,
        trust_domain: str,
        others: Sequence[x509.Certificate] = (),
    ) -> None:
        self.certificate = certificate
        self.trust_domain = trust_domain
        self._key = key
        self._others = tuple(others)

    @classmethod
    def create(cls, policy: Policy, *, now: datetime, trust_domain: str | None = None) -> CertificateAuthority:
        """Makes a new authority, in memory alone. Raises InvalidRequestError for a bad trust domain."""
        domain = trust_domain if trust_domain is not None else policy.trust_domain
        check_trust_domain(domain)
        key = ec.generate_private_key(ec.SECP256R1())
        # A name of its own for each authority, so that two of one mesh are told apart in logs and by OpenSSL.
        serial = x509.random_serial_number()
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Chorus"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"Chorus CA {serial & 0xFFFFFFFF:08x}"),
            ]
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(now - policy.backdate)
            .not_valid_after(now + policy.authority_lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{domain}")]), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key, domain)

    @classmethod
    def load(cls, directory: Path, key_name: str = CA_KEY) -> CertificateAuthority:
        """Reads an authority back. Raises CertificateError naming the file and what to do."""
        certificate_path, key_path = directory / CA_FILE, directory / key_name
        try:
            certificates = x509.load_pem_x509_certificates(certificate_path.read_bytes())
            key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        except FileNotFoundError as error:
            raise CertificateError(
                f"there is no certificate authority in {directory} ({Path(error.filename).name} is missing); "
                "run `chorus certs init`, or copy certificates from the machine that has it"
            ) from error
        except OSError as error:
            raise CertificateError(f"cannot read {error.filename}: {error.strerror}") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CertificateError(f"{CA_FILE} or {CA_KEY} in {directory} is damaged: not PEM") from error
        # While one authority takes over from another, both are in the file; the key says which of them signs.
        own = [certificate for certificate in certificates if certificate.public_key() == key.public_key()]
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not own:
            raise CertificateError(f"{key_path} is not the key of {certificate_path}; restore the pair from one backup")
        others = [certificate for certificate in certificates if certificate != own[0]]
        return cls(own[0], key, authority_trust_domain(own[0]), others)

    @property
    def not_after(self) -> datetime:
        """When the authority, and with it every certificate that it signed, ends."""
        return self.certificate.not_valid_after_utc

    @property
    def certificate_pem(self) -> bytes:
        """The authority's certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """Its key."""
        return _key_pem(self._key)

    @property
    def believed_pem(self) -> bytes:
        """Whom holders of its leaves are to believe: itself first."""
        return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in (self.certificate, *self._others))

    def write(self, directory: Path, *, replace: bool = False) -> None:
        """Writes `ca.key` and `ca.crt`, making the directory closed to others. Raises CertificateError."""
        make_directory(directory)
        if not replace:
            for name in (CA_FILE, CA_KEY):
                if (directory / name).exists():
                    raise CertificateError(
                        f"{directory / name} exists already; --force makes a new authority, after which every "
                        "certificate of the old one is worthless"
                    )
        write_new(directory / CA_KEY, self.key_pem, KEY_MODE, replace=replace)
        write_new(directory / CA_FILE, self.certificate_pem, CERTIFICATE_MODE, replace=replace)

    def issue(
        self,
        identity: SpiffeId,
        policy: Policy,
        *,
        now: datetime,
        addresses: Sequence[str] = (),
        lifetime: timedelta | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
        node: str | None = None,
    ) -> Leaf:
        """Makes a certificate for `identity`, and a key, unless it keeps its `key`.

        `addresses` are the IP addresses and DNS names that it is reached by, besides its pinned name; `node` is the id
        of the node that its holder is on. A leaf never outlives the authority. Raises InvalidRequestError for an
        address that cannot be, or that belongs to another identity, CertificateError where the authority itself has
        expired.
        """
        key = key if key is not None else ec.generate_private_key(ec.SECP256R1())
        certificate = self.certify(
            identity, key.public_key(), policy, now=now, addresses=addresses, lifetime=lifetime, node=node
        )
        return Leaf(
            spiffe_id=identity,
            not_after=certificate.not_valid_after_utc,
            ca_pem=self.believed_pem,
            cert_pem=certificate.public_bytes(serialization.Encoding.PEM),
            key_pem=_key_pem(key),
        )

    def certify(
        self,
        identity: SpiffeId,
        public_key: ec.EllipticCurvePublicKey,
        policy: Policy,
        *,
        now: datetime,
        addresses: Sequence[str] = (),
        lifetime: timedelta | None = None,
        node: str | None = None,
    ) -> x509.Certificate:
        """Signs a certificate of `identity` for a key that somebody else may hold. Raises as `issue`."""
        if identity.trust_domain != self.trust_domain:
            raise InvalidRequestError(
                "trust_domain", f"{identity} is not of this authority's trust domain, {self.trust_domain}"
            )
        if problem := date_problem(self.certificate, now):
            raise CertificateError(f"the authority {problem}".replace("certs issue", "certs init"))
        wanted = lifetime if lifetime is not None else policy.lifetimes[identity.role]
        not_after = min(now + wanted, self.not_after)
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if identity.role.serves:
            purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(str(identity)),
            x509.DNSName(identity.dns_name),
            *(_alternative_name(address, identity) for address in dict.fromkeys(addresses)),
            *([x509.DNSName(node_dns_name(node, identity.trust_domain))] if node else []),
        ]
        return (
            x509.CertificateBuilder()
            .subject_name(
                x509.Name(
                    [
                        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Chorus"),
                        # At most 64 characters; a label has at most 63. Nothing reads it but people.
                        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, identity.role),
                        x509.NameAttribute(NameOID.COMMON_NAME, identity.name),
                    ]
                )
            )
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - min(policy.backdate, wanted / 10), self.certificate.not_valid_before_utc))
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                    self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
                ),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )


def now_utc() -> datetime:
    """Returns the time, in whole seconds as certificates have it."""
    return datetime.now(UTC).replace(microsecond=0)


def _alternative_name(address: str, identity: SpiffeId) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address.strip("[]")))
    except ValueError:
        pass
    name = address.lower().removesuffix(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise InvalidRequestError(
            "address", f"{address[:80]!r} is neither an IP address nor a DNS name in plain letters"
        )
    roles = (f"{role}.{identity.trust_domain}" for role in Role)
    for zone in (*roles, node_zone(identity.trust_domain)):
        if (name == zone or name.endswith(f".{zone}")) and name != identity.dns_name:
            raise InvalidRequestError(
                "address",
                f"{name!r} is a name of this mesh's own; a certificate that had it could pose as it",
            )
    return x509.DNSName(name)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
