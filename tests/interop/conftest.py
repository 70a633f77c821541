"""A mesh for clients that know nothing of Chorus but its protos, and a client's certificate in files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.mesh import InProcessMesh

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"


@dataclass(frozen=True)
class Outside:
    """What a program outside of Chorus is given."""

    mesh: InProcessMesh
    certs: Path  # of a client

    def server_name(self, role: Role, name: str) -> str:
        """The pinned DNS name of a service."""
        return self.mesh.certificates.id(role, name).dns_name

    @property
    def coordinator(self) -> tuple[str, str]:
        """Address and pinned name of the coordinator."""
        return self.mesh.coordinators[0].address, self.server_name(Role.COORDINATOR, "coordinator-1")


@pytest.fixture(scope="session")
def certificates() -> MeshCertificates:
    return MeshCertificates()


@pytest.fixture
async def outside(certificates: MeshCertificates, tmp_path: Path) -> AsyncIterator[Outside]:
    """A mesh with one runner, and a client's certificate."""
    async with InProcessMesh(certificates=certificates) as mesh:
        yield Outside(mesh, certificates.leaf(Role.CLIENT, "outside").write(tmp_path))
