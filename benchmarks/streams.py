"""Streams that run all the time, started anew as they end: by the Python client, and by a plain Node.js client."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Protocol

from meshes import Mesh
from oracle import Gap, Tally, ask, right_ids
from processes import BenchmarkError

from chorus.client import AttemptChanged, MeshClient, StartedAt
from chorus.core.errors import ChorusError
from chorus.core.generation import TokenDelta
from chorus.core.identity import Role

_ROOT = Path(__file__).resolve().parent.parent
_NODE_MODULES = _ROOT / "tests" / "interop" / "node" / "node_modules"
_SCRIPT = Path(__file__).resolve().parent / "node" / "streams.js"
LONGEST_S = 120.0
"""A stream that takes longer hangs."""


class Streams(Protocol):
    """Streams of one client."""

    tally: Tally

    def busy(self) -> Counter[str]:
        """How many streams each runner has now, as far as the client knows."""
        ...

    async def stop(self) -> None:
        """Breaks them off. Raises what is the benchmark's own fault."""
        ...


class PythonStreams:
    """By `chorus.client`, which goes on at another coordinator by itself."""

    def __init__(self, client: MeshClient, count: int) -> None:
        self._client = client
        self._numbers = itertools.count()
        self.tally = Tally()
        self._now_on: dict[int, str] = {}  # those with a token delivered, and more to come
        self._tasks = [asyncio.create_task(self._run(place)) for place in range(count)]

    def busy(self) -> Counter[str]:
        """How many streams each runner has now."""
        return Counter(self._now_on.values())

    async def stop(self) -> None:
        """Breaks them off. Raises what one of them ended with."""
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    async def _run(self, place: int) -> None:
        while True:
            text = f"stream {next(self._numbers)}"
            try:
                async with asyncio.timeout(LONGEST_S):
                    await self._one(place, text)
            except ChorusError as error:
                self.tally.failed(error.reason, error.message)
            except TimeoutError:
                self.tally.failed("hung", f"a stream took over {LONGEST_S:.0f} s")
            finally:
                self._now_on.pop(place, None)

    async def _one(self, place: int, text: str) -> None:
        tally, right = self.tally, await right_ids(text)
        got: list[int] = []
        runner, last = "", 0.0
        changed: AttemptChanged | None = None
        async with self._client.generate(ask(text)) as generation:
            async for event in generation:
                if isinstance(event, StartedAt):
                    runner = event.origin.runner_id
                elif isinstance(event, AttemptChanged):
                    runner, changed = event.runner_id, event
                elif isinstance(event, TokenDelta):
                    now = time.monotonic()
                    if changed is not None:
                        lost = "coordinator" if changed.coordinator else "runner"
                        tally.gaps.append(Gap("python", lost, now - last, time.time()))
                        changed = None
                    last = now
                    tally.wrong["index out of turn"] += event.index != len(got)
                    got += event.token_ids
                    self._now_on[place] = runner
        tally.judge(right, got)


class NodeStreams:
    """By a program that knows nothing of Chorus but its protos: it sends the ids it has to another coordinator."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.tally = Tally()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, mesh: Mesh, count: int) -> NodeStreams:
        """Starts the program. Raises `BenchmarkError` where Node.js isn't there."""
        why = node_missing()
        if why:
            raise BenchmarkError(why)
        coordinators = [f"127.0.0.1:{mesh.port(name)}={mesh.server_name(name)}" for name in mesh.shape.coordinators]
        certs = mesh.folder / f"{Role.CLIENT.value}-{mesh.shape.clients[0]}"
        process = await asyncio.create_subprocess_exec(
            "node", str(_SCRIPT), str(certs), str(_ROOT / "protos"), str(count), *coordinators,
            env={"NODE_PATH": str(_NODE_MODULES), "PATH": "/usr/local/bin:/usr/bin:/bin"},
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        return cls(process)

    def busy(self) -> Counter[str]:
        """It does not tell before a stream's end."""
        return Counter()

    async def stop(self) -> None:
        """Ends the program. Raises `BenchmarkError` where it ended by itself."""
        if self._process.returncode is not None:
            raise BenchmarkError(f"the Node.js client ended by itself (status {self._process.returncode})")
        assert self._process.stdin is not None
        self._process.stdin.close()  # which tells it to end
        try:
            async with asyncio.timeout(10.0):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reading

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            told = json.loads(line)
            if told.get("error"):
                self.tally.failed(f"{told['code']}", f"Node.js: {told['error']}")
                continue
            self.tally.judge(await right_ids(told["prompt"]), told["ids"])
            self.tally.wrong["index out of turn"] += told["out_of_turn"]
            self.tally.gaps += [Gap("node", gap["lost"], gap["ms"] / 1000, gap["at"] / 1000) for gap in told["gaps"]]


def node_missing() -> str:
    """Why there is no Node.js client here; empty where there is one."""
    if shutil.which("node") is None:
        return "Node.js is missing: install version 18 or newer"
    if not (_NODE_MODULES / "@grpc" / "grpc-js").is_dir():
        subprocess.run(["bash", str(_ROOT / "tests" / "interop" / "setup.sh")], stdout=subprocess.DEVNULL, check=False)
    if not (_NODE_MODULES / "@grpc" / "grpc-js").is_dir():
        return "Node.js has no @grpc/grpc-js: tests/interop/setup.sh installs it, and says what is in its way"
    return ""
