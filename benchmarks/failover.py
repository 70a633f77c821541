"""Runners that die or freeze in the middle of streams: is a token lost, doubled or wrong, and how long comes nothing?

    make bench ONLY=failover

Three runners, a registry and a coordinator, each a process of its own, over mutual TLS. The runners' engine is the fake
one, whose every token tells its place in the answer, so what arrives can be checked exactly. Streams run all the time,
started anew as they end; at a random moment the runner with a token on its way is killed (`kill -9`), or stopped
(SIGSTOP) and continued seconds later, when it must not be heard again; a killed one is started anew, and the next fault
waits until all three serve. Told are the gaps that the callers of broken streams saw between two tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from figures import Bar, percentile, verdict
from processes import BenchmarkError, Processes, Started, free_port, machine, processes_in, say
from servers import mesh_environ

from chorus.client import AttemptChanged, MeshClient, StartedAt
from chorus.config.address import Endpoint
from chorus.core.errors import ChorusError
from chorus.core.generation import GenerationRequest, TextPrompt, TokenDelta
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.service import TOKENS_PER_SECOND_ENV
from chorus.transport import TlsIdentity

_RUNNERS = ("alpha", "beta", "gamma")
_TOKENS_PER_SECOND = 25
_READY_S = 60.0
_LONGEST_S = 120.0  # a stream that takes longer hangs
_KILL_BAR_S, _FREEZE_BAR_S = 0.5, 3.0
_FROZEN_S = 4.0
_RUNNER = """
import sys
from chorus.config import load_config
from chorus.runner.main import run
from chorus.testing.service import make_fake_engine
sys.exit(run(load_config(), make_engine=make_fake_engine))
"""


@dataclass
class Tally:
    """What the callers saw."""

    streams: int = 0
    tokens: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    gaps_s: list[float] = field(default_factory=list)


class Mesh:
    """The processes, and who is known to serve."""

    def __init__(self, processes: Processes, certificates: MeshCertificates) -> None:
        self._processes = processes
        folder = processes.folder
        for role, names in (
            (Role.REGISTRY, ["registry"]),
            (Role.COORDINATOR, ["coordinator"]),
            (Role.CLIENT, ["bench"]),
            (Role.RUNNER, _RUNNERS),
        ):
            for name in names:
                certificates.leaf(role, name).write(folder)
        registry, coordinator = free_port(), free_port()
        self._environ = mesh_environ(folder, certificates) | {
            TOKENS_PER_SECOND_ENV: str(_TOKENS_PER_SECOND),
            "CHORUS_REGISTRY__LISTEN": f"127.0.0.1:{registry}",
            "CHORUS_COORDINATOR__LISTEN": f"127.0.0.1:{coordinator}",
            "CHORUS_COORDINATOR__REGISTRIES": f"127.0.0.1:{registry}",
            "CHORUS_RUNNER__REGISTRIES": f"127.0.0.1:{registry}",
            "CHORUS_RUNNER__LISTEN": "127.0.0.1:0",
            "CHORUS_RUNNER__SLOTS": "16",
        }
        for name in ("registry", "coordinator"):
            processes.start(name, [sys.executable, "-m", "chorus.cli.main", name], self._environ)
        self.runners: dict[str, Started] = {}
        for name in _RUNNERS:
            self.start(name)
        identity = TlsIdentity.load(folder / f"{Role.CLIENT.value}-bench")
        self.client = MeshClient([Endpoint.parse(f"127.0.0.1:{coordinator}")], identity=identity, timeout_s=_LONGEST_S)

    def start(self, name: str) -> None:
        """Starts a runner."""
        environ = self._environ | {"CHORUS_RUNNER__NAME": name}
        self.runners[name] = self._processes.start(name, [sys.executable, "-c", _RUNNER], environ, watches_parent=True)

    def kill(self, name: str) -> None:
        """As `kill -9` does."""
        process = self.runners[name]
        os.kill(process.pid, signal.SIGKILL)
        self._processes.end(process)

    async def until_all_serve(self) -> None:
        """Returns once requests could go to each runner. Raises `BenchmarkError` if that does not come."""
        deadline = time.monotonic() + _READY_S
        why = ""
        while time.monotonic() < deadline:
            try:
                placement = await self.client.explain_placement(_ask("is everybody there?"))
                serving = sorted({candidate.runner_id for candidate in placement.candidates})
                if serving == sorted(_RUNNERS):
                    return
                why = f"only {', '.join(serving) or 'nobody'} would serve"
            except ChorusError as error:
                why = error.message
            await asyncio.sleep(0.1)
        raise BenchmarkError(f"the mesh is not whole within {_READY_S:.0f} s: {why}")


class Streams:
    """Streams that run all the time, and who has them now."""

    def __init__(self, client: MeshClient, count: int) -> None:
        self._client = client
        self._numbers = itertools.count()
        self.tally = Tally()
        self.now_on: dict[int, str] = {}  # those with a token delivered, and more to come
        self._tasks = [asyncio.create_task(self._run(place)) for place in range(count)]

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
                async with asyncio.timeout(_LONGEST_S):
                    await self._one(place, text)
            except ChorusError as error:
                self.tally.wrong[f"failed: {error.reason}"] += 1
            except TimeoutError:
                self.tally.wrong["hung"] += 1
            finally:
                self.now_on.pop(place, None)

    async def _one(self, place: int, text: str) -> None:
        tally, right = self.tally, await right_ids(text)
        got: list[int] = []
        runner, last, changed = "", 0.0, False
        async for event in self._client.generate(_ask(text)):
            if isinstance(event, StartedAt):
                runner = event.origin.runner_id
            elif isinstance(event, AttemptChanged):
                runner, changed = event.runner_id, True
            elif isinstance(event, TokenDelta):
                now = time.monotonic()
                if changed:
                    tally.gaps_s.append(now - last)
                    changed = False
                last = now
                if event.token_ids:
                    tally.wrong["index out of turn"] += event.index != len(got)
                got += event.token_ids
                self.now_on[place] = runner
        tally.streams += 1
        tally.tokens += len(got)
        tally.wrong["lost"] += max(len(right) - len(got), 0)
        tally.wrong["doubled"] += max(len(got) - len(right), 0)
        tally.wrong["wrong"] += sum(a != b for a, b in zip(got, right, strict=False))


def _ask(text: str) -> GenerationRequest:
    return GenerationRequest(model="", prompt=TextPrompt(text))


async def right_ids(text: str) -> list[int]:
    """What each runner answers."""
    events = FakeEngine().generate(_ask(text))
    return [token async for event in events if isinstance(event, TokenDelta) for token in event.token_ids]


async def faults(mesh: Mesh, streams: Streams, kind: str, count: int, draw: random.Random) -> list[float]:
    """So many faults of one kind, one after the other; returns the gaps that callers saw."""
    streams.tally.gaps_s.clear()
    for number in range(1, count + 1):
        await mesh.until_all_serve()
        await asyncio.sleep(draw.uniform(0.2, 1.2))
        busy = Counter(streams.now_on.values())
        victim = draw.choice(sorted(busy) or list(_RUNNERS))
        if kind == "kill":
            mesh.kill(victim)
            mesh.start(victim)
        else:
            os.kill(mesh.runners[victim].pid, signal.SIGSTOP)
            await asyncio.sleep(_FROZEN_S)
            os.kill(mesh.runners[victim].pid, signal.SIGCONT)
        say(f"{kind} {number}/{count}: {victim}, which had {busy[victim]} of {busy.total()} streams")
    await mesh.until_all_serve()
    return list(streams.tally.gaps_s)


async def run(chosen: argparse.Namespace) -> int:
    """Runs it all and prints it; returns an exit status."""
    print(f"{machine()}; {len(_RUNNERS)} runners of {_TOKENS_PER_SECOND} tokens/s, {chosen.streams} streams.")
    draw = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as folder, processes_in(Path(folder)) as processes:
        mesh = Mesh(processes, MeshCertificates())
        async with mesh.client:
            await mesh.until_all_serve()
            streams = Streams(mesh.client, chosen.streams)
            gaps = {
                "kill": await faults(mesh, streams, "kill", chosen.kills, draw),
                "freeze": await faults(mesh, streams, "freeze", chosen.freezes, draw),
            }
            await streams.stop()
    tally = streams.tally
    print("\n| fault | times | streams carried over | gap p50, ms | p99 | longest |\n|---|---|---|---|---|---|")
    for (kind, seen), times in zip(gaps.items(), (chosen.kills, chosen.freezes), strict=True):
        p50, p99, most = (1000 * percentile(seen, share) for share in (0.5, 0.99, 1.0))
        print(f"| {kind} | {times} | {len(seen)} | {p50:,.0f} | {p99:,.0f} | {most:,.0f} |")
    usual = 1000 / _TOKENS_PER_SECOND
    print(f"\n{tally.streams} whole answers, {tally.tokens} tokens; {usual:.0f} ms between two tokens otherwise.")
    troubles = {what: count for what, count in tally.wrong.items() if count}
    bars = [Bar(f"nothing lost, doubled, wrong or failed: {troubles or 'nothing'}", not troubles)]
    for kind, limit in (("kill", _KILL_BAR_S), ("freeze", _FREEZE_BAR_S)):
        if gaps[kind]:
            p99 = percentile(gaps[kind], 0.99)
            bars.append(Bar(f"gap p99 after a {kind} at most {limit * 1000:,.0f} ms: {p99 * 1000:,.0f}", p99 <= limit))
    return verdict(bars)


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills (default: %(default)s, some 15 minutes)")
    parser.add_argument("--freezes", type=int, default=20, help="runners stopped for 4 s (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=12, help="streams at any time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="ten kills and two freezes: does it run at all?")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.kills, chosen.freezes = 10, 2
    return asyncio.run(run(chosen))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit(130)
