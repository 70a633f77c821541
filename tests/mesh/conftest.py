"""One mesh for the whole session: an authority and identities that it signed. All listens on loopback, port 0."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

import pytest

from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.transport import TlsIdentity

if TYPE_CHECKING:
    from tests.mesh.local_mesh import LocalMesh

TRUST_DOMAIN = "test.chorus.local"

Identities: TypeAlias = Callable[[Role, str], TlsIdentity]


@pytest.fixture(scope="session")
def certificates() -> MeshCertificates:
    """The session's authority."""
    return MeshCertificates(TRUST_DOMAIN)


@pytest.fixture(scope="session")
def identity_of(certificates: MeshCertificates) -> Identities:
    """Issues the identity of (role, name), once for each."""
    return cache(certificates.identity)


@pytest.fixture
async def local_mesh(identity_of: Identities) -> AsyncIterator[LocalMesh]:
    """Starts registries and runners, which end with the test."""
    from tests.mesh.local_mesh import LocalMesh

    async with AsyncExitStack() as stack:
        yield LocalMesh(identity_of, stack)
