"""A second machine, as far as the network knows: a Linux network namespace with an address of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_NEEDS = "no network namespace can be made here; it takes root and iproute2"


class NoNamespaceError(Exception):
    """None can be made here: no `ip`, or no right to."""


@dataclass(frozen=True, slots=True)
class Network:
    """This side's address and the second machine's; nobody else is on it. Processes that run at once have their own."""

    here: str
    there: str

    @contextmanager
    def second_machine(self) -> Iterator[Namespace]:
        """Makes the namespace, which is gone when the block is left. Raises NoNamespaceError."""
        number = os.getpid()
        made, near, far = Namespace(f"chorus-{number}"), f"ch{number}a", f"ch{number}b"
        if not _ip("netns", "add", made.name):
            raise NoNamespaceError(_NEEDS)
        inside = made.command("ip")[1:]
        try:
            connected = all(
                (
                    _ip("link", "add", near, "type", "veth", "peer", "name", far),
                    _ip("link", "set", far, "netns", made.name),
                    _ip("link", "set", near, "up"),
                    _ip(*inside, "addr", "add", f"{self.there}/30", "dev", far),
                    _ip(*inside, "link", "set", far, "up"),
                    _ip(*inside, "link", "set", "lo", "up"),
                    _ip("route", "add", f"{self.there}/32", "dev", near, "src", self.here),
                )
            )
            if not connected:
                raise NoNamespaceError("no network can be made between here and a namespace")
            yield made
        finally:
            _ip("link", "del", near)
            _ip("netns", "del", made.name)


@dataclass(frozen=True, slots=True)
class Namespace:
    """The second machine."""

    name: str

    def command(self, *words: str) -> tuple[str, ...]:
        """That command, to be run in there."""
        return ("ip", "netns", "exec", self.name, *words)


@contextmanager
def network() -> Iterator[Network]:
    """Gives this side an address until the block is left, whatever a namespace does. Raises NoNamespaceError."""
    number = os.getpid()
    prefix = f"10.{64 + number // 254 % 64}.{number % 254}"
    made = Network(f"{prefix}.1", f"{prefix}.2")
    if shutil.which("ip") is None or not _ip("addr", "add", f"{made.here}/32", "dev", "lo"):
        raise NoNamespaceError(_NEEDS)
    try:
        yield made
    finally:
        _ip("addr", "del", f"{made.here}/32", "dev", "lo")


def _ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0  # noqa: S603, S607
