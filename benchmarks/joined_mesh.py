"""A mesh of processes that joined with tokens, as `chorus join` does it, and renew by themselves."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from processes import BenchmarkError, Processes, free_port

from chorus.client.identity import IdentityClient
from chorus.config import ChorusConfig, Endpoint, load_config, to_toml
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.join_line import JoinLine
from chorus.identity.ca import CertificateAuthority, now_utc
from chorus.identity.policy import load_policy
from chorus.local.home import MeshHome
from chorus.local.joining import Joined, Wish, join
from chorus.transport.tls import TlsIdentity

DOMAIN, HOST = "joined.chorus.local", "127.0.0.1"
START_S = 60.0


@dataclass(frozen=True)
class Mesh:
    """The running mesh: where its services are (port, identity), who may make tokens, and the configuration of a client
    that joined."""

    host: str
    addresses: Mapping[str, tuple[int, SpiffeId]]
    joins_at: Endpoint
    admin: TlsIdentity
    client: ChorusConfig

    def administration(self) -> IdentityClient:
        """A client of its identity service, for the admin."""
        return IdentityClient(Endpoint(self.host, self.addresses["identity"][0], "identity"), self.admin)

    async def token(self, role: Role) -> JoinLine:
        """A new token."""
        async with self.administration() as client:
            return (await client.create_token(role, ttl_s=600))[1]


def start(
    folder: Path,
    processes: Processes,
    served: Sequence[tuple[Role, str]],
    *,
    host: str = HOST,
    life_s: float = 86_400.0,
    environ: Mapping[str, str] = {},
) -> Mesh:
    """Makes the authority, starts the identity service, has every service join and starts it. Raises BenchmarkError."""
    ports = {name: free_port() for name in ("identity", "join", *(name for _, name in served))}
    certs = folder / "certs"
    authority = CertificateAuthority.create(load_policy(), now=now_utc(), trust_domain=DOMAIN)
    authority.write(certs)
    root = SpiffeId(DOMAIN, Role.ADMIN, "root")
    admin = TlsIdentity.load(authority.issue(root, load_policy(), now=now_utc()).write(certs))
    config = ChorusConfig.model_validate(
        {
            "mesh": {"trust_domain": DOMAIN, "certs_dir": certs},
            "identity": {
                "listen": f"{host}:{ports['identity']}",
                "join_listen": f"{host}:{ports['join']}",
                "leaf_lifetime_s": life_s,
                "registries": [f"registry@{host}:{ports['registry']}"],
                "coordinators": [f"coordinator@{host}:{ports['coordinator']}"],
            },
        }
    )
    file = folder / "identity.toml"
    file.write_text(to_toml(config, "mesh", "log", "identity"))
    own = {**os.environ, **environ}
    argv = [sys.executable, "-m", "chorus.cli.main"]
    processes.start("identity", [*argv, "identity", "--config", file], own, watches_parent=True)
    _until_there(host, ports["identity"], processes)
    addresses = {"identity": (ports["identity"], SpiffeId(DOMAIN, Role.IDENTITY, "identity"))}
    mesh = Mesh(host, addresses, Endpoint(host, ports["join"]), admin, config)

    def joined(role: Role, name: str) -> Joined:
        advertise = Endpoint(host, ports[name]) if name in ports else None
        wish = Wish(name, advertise=advertise, engine="fake" if role is Role.RUNNER else None)
        return join(MeshHome(folder / name), mesh.joins_at, asyncio.run(mesh.token(role)), wish)

    for role, name in served:
        member = joined(role, name)
        processes.start(name, [*argv, role, "--config", member.config_file], own, watches_parent=True)
        _until_there(host, ports[name], processes)
        addresses[name] = (ports[name], member.identity)
    return Mesh(host, addresses, mesh.joins_at, admin, load_config(file=joined(Role.CLIENT, "kim").config_file))


def _until_there(host: str, port: int, processes: Processes) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        processes.check()
        with suppress(OSError), socket.create_connection((host, port), 1):
            return
        time.sleep(0.1)
    raise BenchmarkError(f"nobody listens on port {port} after {START_S:.0f} s")
