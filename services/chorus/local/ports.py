"""Which ports a local mesh uses, and who has them already."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psutil

from chorus.core.errors import ConfigError

DEFAULT_BASE = 7100
HIGHEST_BASE = 65535 - 300
RUNNERS_MAX = 48
RUNNERS_USUAL = 2
OTHER_BASES = range(17100, 60000, 400)


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of a mesh, all within 300 of `base`. Metrics are served on loopback alone."""

    base: int = DEFAULT_BASE

    @property
    def registry(self) -> int:
        """The registry's."""
        return self.base + 1

    def runner(self, index: int) -> int:
        """The runner's, counted from 0."""
        return self.base + 101 + index

    @property
    def coordinator(self) -> int:
        """The coordinator's."""
        return self.base + 201

    @property
    def identity(self) -> int:
        """The identity service's, for admins and services."""
        return self.base + 211

    @property
    def join(self) -> int:
        """Where other machines join."""
        return self.join_beside(self.identity)

    @staticmethod
    def join_beside(identity: int) -> int:
        """Where other machines join the identity service on that port."""
        return identity + 1

    @staticmethod
    def metrics(port: int) -> int:
        """Where the service on `port` shows its metrics."""
        return port + 50


def check_free(host: str, ports: Mapping[str, int]) -> None:
    """Raises ConfigError naming every port that is taken, and by whom where the system tells."""
    taken = [f"port {port} ({what}) is taken{_holder(port)}" for what, port in ports.items() if not is_free(host, port)]
    if taken:
        raise ConfigError(
            f"{'; '.join(taken)}. Stop what runs there, or use other ports: `chorus up --port-base {_suggestion(host)}`"
        )


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As gRPC does: connections that just ended don't count, a server that listens does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except PermissionError as error:
            raise ConfigError(f"port {port} may not be used by this user; choose others with --port-base") from error
        except OSError:
            return False
    return True


def find_base(host: str, runners: int, candidates: Iterable[int]) -> int:
    """Returns the first of `candidates` from which every port is free. Raises ConfigError where there is none."""
    for base in candidates:
        ports = Ports(base)
        wanted = (ports.registry, ports.coordinator, ports.identity, *map(ports.runner, range(runners)))
        if all(is_free(host, port) and is_free("127.0.0.1", ports.metrics(port)) for port in wanted):
            return base
    raise ConfigError("no free ports were found; choose them with --port-base")


def _suggestion(host: str) -> str:
    try:
        return str(find_base(host, RUNNERS_USUAL, OTHER_BASES))
    except ConfigError:
        return "PORT"


def _holder(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr[1] == port
            if listens and connection.pid:
                return f" by process {connection.pid} ({_command(psutil.Process(connection.pid))})"
    except psutil.Error:
        pass
    return ""


def _command(process: psutil.Process) -> str:
    """What a process is, in a word or two; for one of a mesh, which of its services."""
    arguments = process.cmdline()
    if "chorus.cli.main" in arguments[:-1]:
        return f"chorus {arguments[arguments.index('chorus.cli.main') + 1]}"
    return process.name()
