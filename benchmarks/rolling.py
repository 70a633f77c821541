"""Every process of a mesh restarted under steady load, and exchanged for another version: does a request fail?

    make bench ONLY=rolling

Two registries, two coordinators and three runners with the fake engine, over mutual TLS. Streams run all the time,
whose every token is checked, and short questions besides. One process after the other is asked to end (SIGTERM) and
started again; the next has its turn when all serve. First the mesh runs the code of `--before` (a Git revision: by
default the last tag, or else the commit before the protos last changed) and is exchanged for this one, so that for a
while both are on the wire; then it is restarted as it is, and at last it goes back.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

from figures import Bar, percentile, verdict
from meshes import Mesh, Shape
from oracle import ask, right_ids
from processes import BenchmarkError, machine, processes_in, say

from chorus.client import AttemptChanged, MeshClient
from chorus.core.errors import ChorusError
from chorus.core.generation import TokenDelta
from chorus.testing.service import TOKENS_PER_SECOND_ENV

_ROOT = Path(__file__).resolve().parent.parent
_STREAMS, _ASKING = 12, 2
_TOKENS_PER_SECOND = 25
_LONGEST_S = 60.0


class Load:
    """Streams and short questions that go on all the time, and what went wrong with any of them."""

    def __init__(self, client: MeshClient) -> None:
        self._client = client
        self._numbers = itertools.count()
        self.done: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.gaps_s: list[float] = []
        kinds = [self._stream] * _STREAMS + [self._ask] * _ASKING
        self._tasks = [asyncio.create_task(self._repeat(kind)) for kind in kinds]

    async def stop(self) -> None:
        """Ends it. Raises what is nobody's fault but the benchmark's."""
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    async def _repeat(self, kind: object) -> None:
        assert callable(kind)
        while True:
            try:
                async with asyncio.timeout(_LONGEST_S):
                    await kind(f"question {next(self._numbers)}")
            except ChorusError as error:
                if not self.wrong[error.reason]:
                    say(f"failed: {error.message}")
                self.wrong[error.reason] += 1
            except TimeoutError:
                self.wrong["hung"] += 1

    async def _stream(self, text: str) -> None:
        right = await right_ids(text)
        got: list[int] = []
        last = 0.0
        async for event in self._client.generate(ask(text)):
            if isinstance(event, AttemptChanged):
                self.done["carried over"] += 1
            elif isinstance(event, TokenDelta):
                now = time.monotonic()
                if last:
                    self.gaps_s.append(now - last)
                last = now
                got += event.token_ids
        self.wrong["not the right tokens"] += got != right
        self.done["streams"] += 1

    async def _ask(self, text: str) -> None:
        await self._client.count_tokens(text)
        await self._client.embed(text)
        self.done["questions"] += 2
        await asyncio.sleep(0.05)


def revision_before() -> str:
    """The version before this one. Raises `BenchmarkError` where Git doesn't know it."""
    for words in (["describe", "--tags", "--abbrev=0"], ["log", "-1", "--format=%H^", "--", "protos"]):
        found = subprocess.run(["git", "-C", _ROOT, *words], capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.strip()
    raise BenchmarkError("Git knows no version before this one here; name a revision with --before")


def unpack(revision: str, folder: Path) -> Path:
    """The sources of a revision. Raises `BenchmarkError` where there is no such one."""
    packed = subprocess.run(["git", "-C", _ROOT, "archive", revision, "services"], capture_output=True, check=False)
    if packed.returncode != 0:
        raise BenchmarkError(f"Git can't unpack {revision}: {packed.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "services"


async def roll(mesh: Mesh, source: Path) -> None:
    """Exchanges one process after the other."""
    for name in mesh.names:
        began = time.monotonic()
        await mesh.stop(name)
        ended = time.monotonic()
        mesh.start(name, source=source)
        await mesh.until_all_serve()
        say(f"{name}: ended in {ended - began:.1f} s, all serve {time.monotonic() - ended:.1f} s later")


async def run(before: str) -> int:
    """Measures and prints; returns an exit status."""
    print(f"{machine()}; the version before: {before}.\n")
    bars = []
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as name, processes_in(Path(name)) as processes:
        old, new = unpack(before, Path(name) / "before"), _ROOT / "services"
        environ = {TOKENS_PER_SECOND_ENV: str(_TOKENS_PER_SECOND), "CHORUS_RUNNER__SLOTS": "16"}
        shape = Shape(registries=("registry", "registry-b"), coordinators=("coordinator", "coordinator-b"),
                      environ=environ)  # fmt: skip
        mesh = Mesh(processes, shape, source=old)
        await mesh.until_all_serve()
        async with mesh.client(timeout_s=_LONGEST_S) as client:
            for what, source in (("exchanged for this version", new), ("restarted", new), ("taken back", old)):
                load = Load(client)
                await roll(mesh, source)
                await load.stop()
                bars.append(report(what, load))
    return verdict(bars)


def report(what: str, load: Load) -> Bar:
    """Prints what one round came to."""
    done = ", ".join(f"{count} {kind}" for kind, count in load.done.items())
    gaps = f"gap p99 {percentile(load.gaps_s, 0.99) * 1e3:.0f} ms, longest {max(load.gaps_s) * 1e3:.0f} ms"
    print(f"Every process {what}: {done}; {gaps}")
    wrong = {kind: count for kind, count in load.wrong.items() if count}
    return Bar(f"{what}: {sum(wrong.values())} requests failed {wrong or ''}".rstrip(), not wrong)


def main() -> int:
    """Reads the command line; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="REVISION", help="the version to begin with, as Git names it")
    try:
        return asyncio.run(run(parser.parse_args().before or revision_before()))
    except BenchmarkError as error:
        print(f"rolling: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
