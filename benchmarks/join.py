"""From the printed line to the first answer of a new machine, and from its restart: how long?

    make bench ONLY=join

A mesh of processes, and a network namespace with its own address and an empty home: `chorus join` runs in there with a
token's line, and a client here asks for an answer of just that machine until it has one. Then the process is killed,
the namespace is made anew, and what `chorus service install` has systemd run, `chorus join` by itself, brings it back.
It takes root, for the namespace.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

from figures import Bar, percentile, verdict
from joined_mesh import Mesh, start
from processes import BenchmarkError, Processes, Started, machine, processes_in, say

from chorus.client import MeshClient
from chorus.core.errors import ChorusError
from chorus.core.generation import GenerationRequest, Requirements, StopConditions, TextPrompt
from chorus.core.identity import Role
from chorus.testing.namespace import Namespace, Network, NoNamespaceError, network
from chorus.testing.packaged_models import smollm2_path

BAR_S = 10.0
_LIMIT_S = 120.0
_ASK_EVERY_S = 0.05
_SERVED = ((Role.REGISTRY, "registry"), (Role.COORDINATOR, "coordinator"))


def joining(processes: Processes, there: Namespace, home: Path, name: str, *arguments: str) -> Started:
    """`chorus join` in the namespace, with nothing in its home but what it left there itself."""
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": str(Path(__file__).parents[1] / "services"),
        "CHORUS_RUNNER__MODELS_DIR": str(home.parent / "models"),
        "CHORUS_RUNNER__NODE_ID": home.name,
    }
    words = there.command(sys.executable, "-m", "chorus.cli.main", "join", *arguments)
    # A fork would not survive the threads that gRPC has here by now; it's ended by its number in any case.
    return processes.start(name, words, environ, watches_parent=True)


async def answers(client: MeshClient, runner: str, process: Started, since: float) -> float:
    """Seconds since `since` at which that runner answered for the first time. Raises BenchmarkError."""
    only = Requirements(runner_ids=(runner,))
    stop = StopConditions(max_tokens=8)
    request = GenerationRequest(model="", prompt=TextPrompt("hello"), requirements=only, stop=stop)
    last = ""
    while time.monotonic() - since < _LIMIT_S:
        process.check()
        try:
            async with asyncio.timeout(_LIMIT_S):
                async for _ in client.generate(request):
                    pass
            return time.monotonic() - since
        except (ChorusError, TimeoutError) as error:
            last = str(error)
            await asyncio.sleep(_ASK_EVERY_S)
    raise BenchmarkError(f"{runner} answered nothing in {_LIMIT_S:.0f} s: {last}\n{process.last_words()}")


async def once(
    net: Network, mesh: Mesh, processes: Processes, folder: Path, number: int, engine: str
) -> tuple[float, float, float]:
    """Joins, restarts; returns the seconds of both, and the CPU seconds that joining took."""
    name, home = f"guest-{engine}-{number}", folder / f"home-{engine}-{number}"
    home.mkdir()
    line = await mesh.token(Role.RUNNER)
    async with MeshClient.from_config(mesh.client) as client:
        arguments = (str(mesh.joins_at), "--token", str(line), "--engine", engine, "--name", name)
        with net.second_machine() as there:
            began = time.monotonic()
            process = joining(processes, there, home, name, *arguments)
            joined_s = await answers(client, name, process, began)
            cpu_s = process.cpu_s()
            process.kill()
            processes.end(process)
        with net.second_machine() as there:
            began = time.monotonic()
            process = joining(processes, there, home, f"{name}-again")
            back_s = await answers(client, name, process, began)
            processes.end(process)
    return joined_s, back_s, cpu_s


async def everybody(
    net: Network, mesh: Mesh, processes: Processes, folder: Path, tries: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Joins so many machines with each engine, one after the other; returns what `once` does, by engine."""
    seen: dict[str, list[tuple[float, float, float]]] = {"fake": [], "llama": []}
    for engine, times in seen.items():
        for number in range(tries):
            times.append(await once(net, mesh, processes, folder, number, engine))
            say(f"{engine}: serves after {times[-1][0]:.1f} s, {times[-1][2]:.1f} of CPU; back {times[-1][1]:.1f}")
    return seen


def main() -> int:
    """Runs it; returns 1 if a bar was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tries", type=int, default=3, help="machines that join, with each engine")
    parser.add_argument("--quick", action="store_true", help="one of each")
    given = parser.parse_args()
    tries = 1 if given.quick else given.tries
    print(machine())
    bars = []
    with network() as net, tempfile.TemporaryDirectory() as scratch, processes_in(Path(scratch)) as processes:
        folder = Path(scratch)
        (folder / "models").mkdir()
        (folder / "models" / smollm2_path().name).symlink_to(smollm2_path())
        mesh = start(folder, processes, _SERVED, host=net.here)
        for engine, seen in asyncio.run(everybody(net, mesh, processes, folder, tries)).items():
            for what, column in (("serves", 0), ("is back after a restart", 1)):
                times = [one[column] for one in seen]
                told = f"{percentile(times, 0.5):.1f} s (the slowest of {tries}: {max(times):.1f} s)"
                bars.append(Bar(f"engine {engine}: it {what} within {BAR_S:.0f} s: {told}", max(times) <= BAR_S))
    return verdict(bars)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BenchmarkError, ChorusError, NoNamespaceError) as error:
        sys.exit(f"join: {error}")
