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
import socket
import ssl
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from figures import Bar, verdict
from joined_mesh import HOST, START_S, Mesh, start
from oracle import ask, right_ids
from processes import BenchmarkError, Processes, machine, processes_in, say

from chorus.client import AttemptChanged, MeshClient
from chorus.core.errors import ChorusError
from chorus.core.generation import TokenDelta
from chorus.core.identity import Role, SpiffeId
from chorus.testing.service import TOKENS_PER_SECOND_ENV
from chorus.transport.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE

LIFE_S, CONNECT_EVERY_S = 60.0, 5.0
_LONG, _SHORT = 4, 2
_TOKENS_PER_SECOND = 20
_LONG_WORDS = 350
"""At five tokens a word, 87 s: longer than any certificate lives."""
_ENVIRON = {TOKENS_PER_SECOND_ENV: str(_TOKENS_PER_SECOND)}
SERVED = ((Role.REGISTRY, "registry"), (Role.COORDINATOR, "coordinator"), (Role.RUNNER, "r1"), (Role.RUNNER, "r2"))


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
        await client.complete("echo:ready", timeout_s=START_S)
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
        mesh = start(Path(scratch), processes, SERVED, life_s=LIFE_S, environ=_ENVIRON)
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
