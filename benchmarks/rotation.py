"""Certificates that live a minute, under streams: is anything noticed while all of them are replaced again and again?

    make bench ONLY=rotation

An identity service, a registry, a coordinator and two runners with the fake engine, each a process that joined with a
token, as `chorus join` does it, and renews by itself. Streams of more than a certificate's life go on all the time, and
short ones besides; every token is checked. Every 5 s a new client connects and asks, and every service is shaken hands
with, which tells the serial number of the certificate that it shows to new connections.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import socket
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from figures import Bar, verdict
from oracle import ask, right_ids
from processes import BenchmarkError, Processes, free_port, machine, processes_in, say

from chorus.client import AttemptChanged, MeshClient
from chorus.client.identity import IdentityClient
from chorus.config import ChorusConfig, Endpoint, load_config, to_toml
from chorus.core.errors import ChorusError
from chorus.core.generation import TokenDelta
from chorus.core.identity import Role, SpiffeId
from chorus.identity.ca import CertificateAuthority, now_utc
from chorus.identity.policy import load_policy
from chorus.local.home import MeshHome
from chorus.local.joining import Joined, Wish, join
from chorus.testing.service import TOKENS_PER_SECOND_ENV
from chorus.transport.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, TlsIdentity

DOMAIN, HOST = "rotation.chorus.local", "127.0.0.1"
LIFE_S, CONNECT_EVERY_S = 60.0, 5.0
_LONG, _SHORT = 4, 2
_TOKENS_PER_SECOND = 20
_LONG_WORDS = 350
"""At five tokens a word, 87 s: longer than any certificate lives."""
_START_S = 60.0
_SERVED = ((Role.REGISTRY, "registry"), (Role.COORDINATOR, "coordinator"), (Role.RUNNER, "r1"), (Role.RUNNER, "r2"))


@dataclass
class Seen:
    """What callers saw."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    serials: dict[str, set[int]] = field(default_factory=dict)

    def failed(self, error: ChorusError | OSError) -> None:
        """A request, or a handshake, that came to nothing."""
        what = error.reason if isinstance(error, ChorusError) else type(error).__name__
        say(f"failed: {what}: {error}")
        self.wrong[what] += 1


@dataclass(frozen=True)
class Mesh:
    """The running mesh: where its services are, and the configuration of a client that joined."""

    addresses: Mapping[str, tuple[int, SpiffeId]]
    client: ChorusConfig


def start(folder: Path, processes: Processes) -> Mesh:
    """Makes the authority, starts the identity service, has every service join and starts it. Raises BenchmarkError."""
    ports = {name: free_port() for name in ("identity", "join", *(name for _, name in _SERVED))}
    certs = folder / "certs"
    authority = CertificateAuthority.create(load_policy(), now=now_utc(), trust_domain=DOMAIN)
    authority.write(certs)
    root = SpiffeId(DOMAIN, Role.ADMIN, "root")
    admin = TlsIdentity.load(authority.issue(root, load_policy(), now=now_utc()).write(certs))
    config = ChorusConfig.model_validate(
        {
            "mesh": {"trust_domain": DOMAIN, "certs_dir": certs},
            "identity": {
                "listen": f"{HOST}:{ports['identity']}",
                "join_listen": f"{HOST}:{ports['join']}",
                "leaf_lifetime_s": LIFE_S,
                "registries": [f"registry@{HOST}:{ports['registry']}"],
                "coordinators": [f"coordinator@{HOST}:{ports['coordinator']}"],
            },
        }
    )
    file = folder / "identity.toml"
    file.write_text(to_toml(config, "mesh", "log", "identity"))
    environ = {**os.environ, TOKENS_PER_SECOND_ENV: str(_TOKENS_PER_SECOND)}
    argv = [sys.executable, "-m", "chorus.cli.main"]
    processes.start("identity", [*argv, "identity", "--config", file], environ, watches_parent=True)
    _until_there(ports["identity"], processes)

    def joined(role: Role, name: str) -> Joined:
        where = Endpoint(HOST, ports["identity"], "identity")
        line = asyncio.run(_token(where, admin, role))
        advertise = Endpoint(HOST, ports[name]) if name in ports else None
        wish = Wish(name, advertise=advertise, engine="fake" if role is Role.RUNNER else None)
        return join(MeshHome(folder / name), Endpoint(HOST, ports["join"]), line, wish)

    addresses = {"identity": (ports["identity"], SpiffeId(DOMAIN, Role.IDENTITY, "identity"))}
    for role, name in _SERVED:
        member = joined(role, name)
        processes.start(name, [*argv, role, "--config", member.config_file], environ, watches_parent=True)
        _until_there(ports[name], processes)
        addresses[name] = (ports[name], member.identity)
    return Mesh(addresses, load_config(file=joined(Role.CLIENT, "kim").config_file))


async def _token(where: Endpoint, admin: TlsIdentity, role: Role) -> object:
    async with IdentityClient(where, admin) as client:
        return (await client.create_token(role, ttl_s=600))[1]


def _until_there(port: int, processes: Processes) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        processes.check()
        with suppress(OSError), socket.create_connection((HOST, port), 1):
            return
        time.sleep(0.1)
    raise BenchmarkError(f"nobody listens on port {port} after {_START_S:.0f} s")


async def stream(client: MeshClient, seen: Seen, kind: str, text: str) -> None:
    """One answer, every token of which is checked."""
    right, got = await right_ids(text), list[int]()
    try:
        async for event in client.generate(ask(text)):
            if isinstance(event, TokenDelta):
                got += event.token_ids
            elif isinstance(event, AttemptChanged):
                seen.done["carried over"] += 1
    except ChorusError as error:
        seen.failed(error)
        return
    seen.wrong["not the right tokens"] += got != right
    seen.done[kind] += 1


def shown_serial(port: int, server: SpiffeId, directory: Path) -> int:
    """The serial number of the certificate that a service shows to a new connection. Raises OSError."""
    context = ssl.create_default_context(cafile=directory / CA_FILE)
    context.load_cert_chain(directory / CERTIFICATE_FILE, directory / KEY_FILE)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((HOST, port), 10) as plain,
        context.wrap_socket(plain, server_hostname=server.dns_name) as secured,
    ):
        return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"").serial_number


async def connect_again(mesh: Mesh, seen: Seen, number: int) -> None:
    """A new client asks, and every service is shaken hands with."""
    async with MeshClient.from_config(mesh.client) as client:
        await stream(client, seen, "by new connections", f"echo:connection {number}")
    directory = mesh.client.mesh.certs_dir / mesh.client.client.identity
    for name, (port, server) in mesh.addresses.items():
        try:
            serial = await asyncio.to_thread(shown_serial, port, server, directory)
        except OSError as error:
            seen.failed(error)
        else:
            seen.serials.setdefault(name, set()).add(serial)


async def load(mesh: Mesh, seconds: float, processes: Processes) -> Seen:
    """Streams until the time is over; those that go on then are read to their ends."""
    seen, numbers, until = Seen(), itertools.count(), time.monotonic() + seconds

    async def again(client: MeshClient, kind: str, text: str) -> None:
        while time.monotonic() < until:
            await stream(client, seen, kind, text.format(next(numbers)))

    async def connecting() -> None:
        while time.monotonic() < until:
            due = time.monotonic() + CONNECT_EVERY_S
            processes.check()
            await connect_again(mesh, seen, next(numbers))
            await asyncio.sleep(due - time.monotonic())

    async with MeshClient.from_config(mesh.client) as client, asyncio.TaskGroup() as group:
        await client.complete("echo:ready", timeout_s=_START_S)
        for _ in range(_LONG):
            group.create_task(again(client, "long streams", "echo:{} " + "word " * _LONG_WORDS))
        for _ in range(_SHORT):
            group.create_task(again(client, "short streams", "question {}"))
        group.create_task(connecting())
    return seen


def main() -> int:
    """Runs it; returns 1 if a bar was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long new streams are begun")
    minutes: float = parser.parse_args().minutes
    print(machine())
    with tempfile.TemporaryDirectory() as scratch, processes_in(Path(scratch)) as processes:
        mesh = start(Path(scratch), processes)
        say(f"all serve; {minutes:g} minutes of streams")
        began = time.monotonic()
        seen = asyncio.run(load(mesh, 60 * minutes, processes))
        took_s = time.monotonic() - began
    rotations = {name: len(serials) - 1 for name, serials in seen.serials.items()}
    # A certificate is renewed when about two thirds of its life are over.
    expected = int(60 * minutes / LIFE_S) - 1
    print(f"\n{took_s:.0f} s: " + ", ".join(f"{count} {what}" for what, count in sorted(seen.done.items())))
    print("rotations seen: " + ", ".join(f"{name} {count}" for name, count in rotations.items()))
    wrong = {what: count for what, count in seen.wrong.items() if count}
    return verdict(
        [
            Bar(
                f"every service was seen to change its certificate at least {expected} times",
                set(rotations) == set(mesh.addresses) and min(rotations.values()) >= expected,
            ),
            Bar(f"no broken stream, no failed request{f': {wrong}' if wrong else ''}", not wrong),
            Bar(
                f"streams longer than a certificate's life: {seen.done['long streams']}", seen.done["long streams"] > 0
            ),
        ]
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BenchmarkError, ChorusError) as error:
        sys.exit(f"rotation: {error}")
