"""A whole mesh for a benchmark: registries, coordinators and runners, each a process of its own, over mutual TLS."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from processes import BenchmarkError, Processes, Started, free_port
from servers import mesh_environ

from chorus.client import MeshClient
from chorus.config.address import Endpoint
from chorus.core.errors import ChorusError
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.transport import TlsIdentity

_READY_S = 120.0
FAKE_RUNNER = """
import sys
from chorus.config import load_config
from chorus.runner.main import run
from chorus.testing.service import make_fake_engine
sys.exit(run(load_config(), make_engine=make_fake_engine))
"""


@dataclass(frozen=True)
class Shape:
    """Who is in a mesh. `environ` is for every process, `own` for those of that name; `runner` is a program, None for
    `chorus runner`."""

    runners: Sequence[str] = ("alpha", "beta", "gamma")
    registries: Sequence[str] = ("registry",)
    coordinators: Sequence[str] = ("coordinator",)
    clients: Sequence[str] = ("bench",)
    runner: str | None = FAKE_RUNNER
    environ: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class Mesh:
    """The processes by name. Registries and coordinators keep their addresses when they are started again."""

    def __init__(self, processes: Processes, shape: Shape, *, source: Path | None = None) -> None:
        """Starts every process, with the code in `source` where one is given."""
        self._processes, self._shape = processes, shape
        self._certificates, self._folder = MeshCertificates(), processes.folder
        for role, names in (
            (Role.REGISTRY, shape.registries),
            (Role.COORDINATOR, shape.coordinators),
            (Role.RUNNER, shape.runners),
            (Role.CLIENT, shape.clients),
        ):
            for name in names:
                self._certificates.leaf(role, name).write(self._folder)
        self._ports = {name: free_port() for name in (*shape.registries, *shape.coordinators)}
        self.started: dict[str, Started] = {}
        for name in self.names:
            self.start(name, source=source)

    @property
    def names(self) -> list[str]:
        """Every process of it."""
        return [*self._shape.registries, *self._shape.coordinators, *self._shape.runners]

    def start(self, name: str, *, source: Path | None = None) -> None:
        """Starts a process of it, which must not be running."""
        shape = self._shape
        registries = ",".join(self._address(registry) for registry in shape.registries)
        environ = mesh_environ(self._folder, self._certificates) | {
            "CHORUS_COORDINATOR__REGISTRIES": registries,
            "CHORUS_RUNNER__REGISTRIES": registries,
            "CHORUS_RUNNER__LISTEN": "127.0.0.1:0",
            **shape.environ,
        }
        if source is not None:
            environ["PYTHONPATH"] = os.pathsep.join([str(source), *filter(None, [environ.get("PYTHONPATH")])])
        if name in shape.runners:
            kind = "runner"
            environ["CHORUS_RUNNER__NAME"] = name
        else:
            kind = "registry" if name in shape.registries else "coordinator"
            environ[f"CHORUS_{kind.upper()}__NAME"] = name
            environ[f"CHORUS_{kind.upper()}__LISTEN"] = f"127.0.0.1:{self._ports[name]}"
        environ |= shape.own.get(name, {})
        argv = [sys.executable, "-m", "chorus.cli.main", kind]
        if kind == "runner" and shape.runner is not None:
            argv = [sys.executable, "-c", shape.runner]
        self.started[name] = self._processes.start(name, argv, environ, watches_parent=True)

    def kill(self, name: str) -> None:
        """As `kill -9` does."""
        os.kill(self.started[name].pid, signal.SIGKILL)
        self._processes.end(self.started.pop(name))

    def freeze(self, name: str) -> None:
        """As a laptop does that goes to sleep: its connections stay open, and it says nothing."""
        os.kill(self.started[name].pid, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """It goes on where it stood."""
        os.kill(self.started[name].pid, signal.SIGCONT)

    async def stop(self, name: str) -> None:
        """Asks it to end, as an operator does, and waits until it has."""
        await asyncio.to_thread(self._processes.end, self.started.pop(name))

    def client(self, name: str = "bench", *, timeout_s: float = 120.0) -> MeshClient:
        """A client of all its coordinators."""
        identity = TlsIdentity.load(self._folder / f"{Role.CLIENT.value}-{name}")
        addresses = [Endpoint.parse(self._address(coordinator)) for coordinator in self._shape.coordinators]
        # What coordinators do is measured: in direct mode they would see nothing of an answer.
        return MeshClient(addresses, identity=identity, timeout_s=timeout_s, direct="never")

    async def until_all_serve(self) -> None:
        """Returns once each coordinator would send requests to each runner.

        Raises `BenchmarkError` if that does not come, or a process has ended.
        """
        identity = TlsIdentity.load(self._folder / f"{Role.CLIENT.value}-{self._shape.clients[0]}")
        deadline = time.monotonic() + _READY_S
        for coordinator in self._shape.coordinators:
            async with MeshClient([Endpoint.parse(self._address(coordinator))], identity=identity) as client:
                while (missing := await self._missing(client)) is not None:
                    self._processes.check()
                    if time.monotonic() > deadline:
                        raise BenchmarkError(f"the mesh is not whole within {_READY_S:.0f} s: {missing}")
                    await asyncio.sleep(0.1)

    @property
    def shape(self) -> Shape:
        """Who is in it."""
        return self._shape

    @property
    def folder(self) -> Path:
        """Where certificates and logs are."""
        return self._folder

    def port(self, name: str) -> int:
        """Where a registry or a coordinator listens."""
        return self._ports[name]

    def certify(self, role: Role, name: str) -> TlsIdentity:
        """A certificate for somebody who is not of it; in `folder`, as those of its own processes are."""
        self._certificates.leaf(role, name).write(self._folder)
        return TlsIdentity.load(self._folder / f"{role.value}-{name}")

    def server_name(self, name: str) -> str:
        """The pinned DNS name of a coordinator."""
        return self._certificates.id(Role.COORDINATOR, name).dns_name

    async def _missing(self, client: MeshClient) -> str | None:
        try:
            placement = await client.explain_placement("is everybody there?")
        except ChorusError as error:
            return error.message
        serving = {candidate.runner_id for candidate in placement.candidates}
        return None if serving >= set(self._shape.runners) else f"only {', '.join(sorted(serving)) or 'nobody'} serves"

    def _address(self, name: str) -> str:
        return f"{name}@127.0.0.1:{self._ports[name]}"
