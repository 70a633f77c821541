"""An identity service on loopback, with an authority of its own in a folder, and admins and machines for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from chorus.client.identity import IdentityClient
from chorus.config import ChorusConfig, Endpoint
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.join_line import JoinLine
from chorus.identity.ca import CertificateAuthority, now_utc
from chorus.identity.policy import load_policy
from chorus.identity.service import IdentityService
from chorus.local.home import MeshHome
from chorus.local.joining import Joined, Wish, join
from chorus.testing.certificates import LOOPBACK, tls_identity
from chorus.transport import TlsIdentity

DOMAIN = "test.chorus.local"


@dataclass
class IdentityMesh:
    """`certs` has the authority; `service` is told of registries and coordinators by `settings`."""

    certs: Path
    service: IdentityService

    @property
    def authority(self) -> CertificateAuthority:
        return self.service.office.authority

    @property
    def where(self) -> Endpoint:
        return Endpoint.parse(self.service.join_address)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint.parse(self.service.address).named("identity")

    def identity(self, role: Role, name: str, lifetime: timedelta | None = None) -> TlsIdentity:
        """One that was issued by hand."""
        leaf = self.authority.issue(
            SpiffeId(DOMAIN, role, name), load_policy(), now=now_utc(), addresses=LOOPBACK, lifetime=lifetime
        )
        return tls_identity(leaf)

    def admin(self) -> IdentityClient:
        """A client of an admin."""
        return IdentityClient(self.endpoint, self.identity(Role.ADMIN, "root"))

    def tell(self, **settings: Any) -> None:
        """Changes what machines that join are told of the others."""
        told = self.service._settings.model_dump() | settings
        self.service._settings = type(self.service._settings).model_validate(told)

    async def token(self, role: Role = Role.RUNNER, *, ttl_s: float = 60.0, **what: str) -> JoinLine:
        """A new token."""
        async with self.admin() as admin:
            return (await admin.create_token(role, ttl_s=ttl_s, **what))[1]

    async def join(self, home: Path, line: JoinLine, name: str = "attic", **wish: Any) -> Joined:
        """Joins as `chorus join` does, from a folder."""
        return await asyncio.to_thread(join, MeshHome(home), self.where, line, Wish(name, **wish))


@asynccontextmanager
async def identity_mesh(
    certs: Path, *, wall: Callable[[], float] | None = None, **settings: Any
) -> AsyncIterator[IdentityMesh]:
    """Runs an identity service until the block is left; the authority is made where there is none yet."""
    if not (certs / "ca.key").exists():
        made = now_utc() - timedelta(days=1)
        CertificateAuthority.create(load_policy(), now=made, trust_domain=DOMAIN).write(certs)
    config = ChorusConfig.model_validate(
        {
            "mesh": {"trust_domain": DOMAIN, "certs_dir": certs},
            "identity": {
                "listen": "127.0.0.1:0",
                "join_listen": "127.0.0.1:0",
                "joins_per_minute": 6000,
                **settings,
            },
        }
    )
    service = IdentityService(config, **({"wall": wall} if wall is not None else {}))
    await service.start()
    try:
        yield IdentityMesh(certs, service)
    finally:
        await service.stop()
