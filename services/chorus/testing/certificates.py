"""Certificates of a mesh that lives for a test: real ones, made in memory."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from chorus.core.identity import Role, SpiffeId
from chorus.identity.ca import CertificateAuthority, Leaf, now_utc
from chorus.identity.policy import load_policy
from chorus.transport.tls import TlsIdentity

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class MeshCertificates:
    """An authority, 30 days old so that it can issue what has expired, and leaves that are reached by loopback."""

    def __init__(self, trust_domain: str = "test.chorus.local", *, now: datetime | None = None) -> None:
        self.now = now if now is not None else now_utc()
        self.policy = load_policy()
        self.authority = CertificateAuthority.create(
            self.policy, now=self.now - timedelta(days=30), trust_domain=trust_domain
        )

    def id(self, role: Role, name: str) -> SpiffeId:
        """Returns the identity of that role and name in this mesh."""
        return SpiffeId(self.authority.trust_domain, role, name)

    def leaf(self, role: Role, name: str, *, addresses: Sequence[str] = LOOPBACK) -> Leaf:
        """Issues a leaf that is valid now."""
        return self.authority.issue(self.id(role, name), self.policy, now=self.now, addresses=addresses)

    def identity(self, role: Role, name: str, *, addresses: Sequence[str] = LOOPBACK) -> TlsIdentity:
        """Issues a leaf that is valid now, ready for channels and servers."""
        return tls_identity(self.leaf(role, name, addresses=addresses))

    def expired(self, role: Role, name: str) -> TlsIdentity:
        """Issues a leaf that expired ten days ago."""
        made = self.now - timedelta(days=20)
        return tls_identity(
            self.authority.issue(
                self.id(role, name), self.policy, now=made, addresses=LOOPBACK, lifetime=timedelta(days=10)
            )
        )


def tls_identity(leaf: Leaf) -> TlsIdentity:
    """Returns what a process that has this leaf would load."""
    return TlsIdentity.from_pem(ca_pem=leaf.ca_pem, cert_pem=leaf.cert_pem, key_pem=leaf.key_pem)
