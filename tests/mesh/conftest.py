"""One mesh for the whole session: an authority and identities that it signed. All listens on loopback, port 0."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TypeAlias

import pytest

from chorus.core.identity import Role, SpiffeId
from chorus.identity.ca import CertificateAuthority
from chorus.identity.policy import load_policy
from chorus.transport import TlsIdentity

TRUST_DOMAIN = "test.chorus.local"

Identities: TypeAlias = Callable[[Role, str], TlsIdentity]


@pytest.fixture(scope="session")
def authority() -> CertificateAuthority:
    """The mesh's authority, in memory."""
    return CertificateAuthority.create(load_policy(), now=datetime.now(UTC), trust_domain=TRUST_DOMAIN)


@pytest.fixture(scope="session")
def identity_of(authority: CertificateAuthority) -> Identities:
    """Issues the identity of (role, name), once for each."""

    @cache
    def issue(role: Role, name: str) -> TlsIdentity:
        leaf = authority.issue(
            SpiffeId(TRUST_DOMAIN, role, name),
            load_policy(),
            now=datetime.now(UTC),
            addresses=["127.0.0.1"],
            lifetime=timedelta(hours=1),
        )
        return TlsIdentity.from_pem(ca_pem=leaf.ca_pem, cert_pem=leaf.cert_pem, key_pem=leaf.key_pem)

    return issue
