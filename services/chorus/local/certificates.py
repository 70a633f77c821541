"""The certificates of a local mesh: made where they are missing, made anew where they no longer do."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from chorus.core.errors import CertificateError
from chorus.core.identity import Role, SpiffeId
from chorus.identity.ca import CA_KEY, CertificateAuthority, leaf_directory, now_utc
from chorus.identity.policy import load_policy
from chorus.transport.tls import CA_FILE, TlsIdentity

CLIENT_NAME = "cli"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def ensure_authority(directory: Path, *, trust_domain: str | None) -> CertificateAuthority:
    """Returns the mesh's authority from `directory`, made there where there is none.

    Raises CertificateError where there is half of one, or one of another trust domain than the one asked for.
    """
    if not any((directory / name).exists() for name in (CA_FILE, CA_KEY)):
        authority = CertificateAuthority.create(load_policy(), now=now_utc(), trust_domain=trust_domain)
        authority.write(directory)
        return authority
    authority = CertificateAuthority.load(directory)
    if trust_domain is not None and authority.trust_domain != trust_domain:
        raise CertificateError(
            f"the authority in {directory} is of {authority.trust_domain}, but mesh.trust_domain is {trust_domain}; "
            "change the key, or choose another folder with mesh.certs_dir"
        )
    return authority


def ensure_leaves(
    directory: Path,
    authority: CertificateAuthority,
    wanted: Mapping[tuple[Role, str], Sequence[str]],
    *,
    renewed: timedelta | None = None,
    node: str | None = None,
) -> list[SpiffeId]:
    """Sees to it that every (role, name) has a certificate for its addresses; returns those that were made now.

    `renewed`: services renew theirs by themselves, and get ones that live so long. They keep their keys, by which the
    identity service knows them. `node` is this machine's id, which is in the certificates of its runners.
    """
    policy, now = load_policy(), now_utc()
    made: list[SpiffeId] = []
    for (role, name), addresses in wanted.items():
        identity = SpiffeId(authority.trust_domain, role, name)
        lifetime = renewed if role.serves else None
        left = (policy.warn, policy.lifetimes[role]) if lifetime is None else (lifetime / 2, lifetime)
        on = node if role is Role.RUNNER else None
        if not _does(directory, authority, identity, addresses, left, now, on):
            key = None if lifetime is None else _key_of(directory, identity)
            leaf = authority.issue(identity, policy, now=now, addresses=addresses, lifetime=lifetime, key=key, node=on)
            leaf.write(directory, replace=True)
            made.append(identity)
    return made


def _key_of(directory: Path, identity: SpiffeId) -> ec.EllipticCurvePrivateKey | None:
    """The key that there is; None where it is of no use."""
    try:
        leaf = TlsIdentity.load(leaf_directory(directory, identity), even_ended=True)
    except CertificateError:
        return None
    key = serialization.load_pem_private_key(leaf.key_pem, password=None)
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def _does(
    directory: Path,
    authority: CertificateAuthority,
    identity: SpiffeId,
    addresses: Sequence[str],
    left: tuple[timedelta, timedelta],
    now: datetime,
    node: str | None,
) -> bool:
    """Whether the leaf that is there is of this authority, lives neither shorter nor longer than that from now on, and
    names every address and the node."""
    try:
        leaf = TlsIdentity.load(leaf_directory(directory, identity), now=now)
    except CertificateError:
        return False
    certificate = x509.load_pem_x509_certificate(leaf.cert_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    named = {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}
    return (
        leaf.spiffe_id == identity
        and leaf.node == node
        and leaf.ca_pem == authority.believed_pem
        and left[0] < leaf.not_after - now <= left[1]
        and {_canonical(address) for address in addresses} <= named
    )


def _canonical(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return address.lower()
