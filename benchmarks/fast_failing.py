"""A runner that answers everything with an instant error, among four: how much traffic does it draw, and how soon is it
back after its repair?

    make bench ONLY=fast_failing

A registry, a coordinator and four runners with the fake engine, each a process of its own, over mutual TLS; 100
requests a second at random times. One runner begins to fail: every request that reaches it ends at once with an error,
so it looks idle. Later it is repaired. What reaches it is counted by itself; callers should see nothing of it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from figures import Bar, verdict
from meshes import Mesh, Shape
from processes import BenchmarkError, machine, processes_in, say

from chorus.client import MeshClient
from chorus.core.errors import ChorusError
from chorus.core.generation import GenerationRequest, StopConditions, TextPrompt
from chorus.testing.service import TOKENS_PER_SECOND_ENV

_RUNNERS = ("alpha", "beta", "gamma", "delta")
_FAILING = "delta"
_RATE = 100.0  # requests a second
_TOKENS, _TOKENS_PER_SECOND = 4, 40
_SETTLED_S = 5.0
_FAIR = 1 / len(_RUNNERS)
_SHARE_BAR, _AFTER_S = 0.02, 1.0
_BACK_BAR, _BACK_WITHIN_S = 0.8, 60.0
_WINDOW_S = 5.0
# Every request that reaches the runner's engine is a line of its journal: when it came.
_RUNNER = """
import os, sys, time
from pathlib import Path
from chorus.config import load_config
from chorus.core.errors import EngineError
from chorus.runner.engines import HostedEngine
from chorus.runner.main import run
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.service import make_fake_engine

name, folder = os.environ["CHORUS_RUNNER__NAME"], Path(os.environ["BENCH_FOLDER"])
journal = (folder / f"{name}.journal").open("a", buffering=1)
broken = folder / f"{name}.broken"

class Engine(FakeEngine):
    async def generate(self, request):
        print(time.monotonic(), file=journal)
        if broken.exists():
            raise EngineError("this runner is broken on purpose")
        async for event in super().generate(request):
            yield event

def make(settings):
    return HostedEngine(Engine(slots=settings.slots, max_queue=settings.max_queue,
                               tokens_per_second=float(os.environ["CHORUS_FAKE_TOKENS_PER_SECOND"])))

sys.exit(run(load_config(), make_engine=make))
"""


class Fault:
    """One runner, which can be broken and repaired, and how much reached each of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._broken = folder / f"{_FAILING}.broken"

    def fail(self) -> float:
        """Breaks the runner; returns when."""
        self._broken.touch()
        return time.monotonic()

    def repair(self) -> float:
        """Repairs it; returns when."""
        self._broken.unlink()
        return time.monotonic()

    def reached(self, name: str, start: float, end: float) -> int:
        """How many requests reached a runner between two moments."""
        journal = self._folder / f"{name}.journal"
        return sum(start <= float(line) < end for line in journal.read_text().splitlines())

    def shares(self, start: float, end: float) -> dict[str, float]:
        """Each runner's share of what reached any of them between two moments."""
        counts = {name: self.reached(name, start, end) for name in _RUNNERS}
        total = max(sum(counts.values()), 1)
        return {name: count / total for name, count in counts.items()}

    async def until_back(self, repaired: float) -> float:
        """Seconds until it had most of its fair share over a whole window; more than the bar if that does not come."""
        while (now := time.monotonic()) < repaired + _BACK_WITHIN_S + 2 * _WINDOW_S:
            if now > repaired + _WINDOW_S and self.shares(now - _WINDOW_S, now)[_FAILING] >= _BACK_BAR * _FAIR:
                return now - repaired
            await asyncio.sleep(0.25)
        return time.monotonic() - repaired


class Traffic:
    """Requests at random times, and what became of them."""

    def __init__(self, client: MeshClient) -> None:
        self._client = client
        self._draw = random.Random(3)
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended: Counter[str] = Counter()
        self._source = asyncio.create_task(self._arrive())

    async def stop(self) -> None:
        """No more of them; returns when all have ended."""
        self._source.cancel()
        await asyncio.gather(self._source, *self._tasks, return_exceptions=True)

    async def _arrive(self) -> None:
        at = time.monotonic()
        while True:
            at += self._draw.expovariate(_RATE)
            await asyncio.sleep(max(at - time.monotonic(), 0.0))
            task = asyncio.create_task(self._one(self.ended.total() + len(self._tasks)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _one(self, number: int) -> None:
        request = GenerationRequest("", TextPrompt(f"request {number}"), stop=StopConditions(max_tokens=_TOKENS))
        try:
            await self._client.complete(request)
            self.ended["answered"] += 1
        except ChorusError as error:
            self.ended[error.reason] += 1


async def run(broken_s: float) -> int:
    """Measures and prints; returns an exit status."""
    print(f"{machine()}; {_RATE:.0f} requests a second to {len(_RUNNERS)} runners with the fake engine.\n")
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as folder, processes_in(Path(folder)) as processes:
        environ = {
            TOKENS_PER_SECOND_ENV: str(_TOKENS_PER_SECOND),
            "BENCH_FOLDER": folder,
            "CHORUS_RUNNER__SLOTS": "16",
        }
        mesh = Mesh(processes, Shape(_RUNNERS, runner=_RUNNER, environ=environ))
        fault, client = Fault(Path(folder)), mesh.client(timeout_s=30.0)
        try:
            await mesh.until_all_serve()
            traffic = Traffic(client)
            say("all are well")
            await asyncio.sleep(2 * _SETTLED_S)
            settled = time.monotonic()
            before = fault.shares(settled - _SETTLED_S, settled)
            failed = fault.fail()
            say(f"{_FAILING} fails for {broken_s:.0f} s")
            await asyncio.sleep(broken_s)
            repaired = fault.repair()
            say(f"{_FAILING} is repaired")
            back_s = await fault.until_back(repaired)
            await traffic.stop()
        finally:
            await client.aclose()
        first = fault.reached(_FAILING, failed, failed + _AFTER_S)
        drawn = fault.shares(failed + _AFTER_S, repaired)[_FAILING]
    print("| | " + " | ".join(_RUNNERS) + " |\n|---|" + "---|" * len(_RUNNERS))
    print("| share of the traffic, all well | " + " | ".join(f"{before[name]:.1%}" for name in _RUNNERS) + " |\n")
    print(f"In its first second of failing {first} requests reached {_FAILING}. Ended: {dict(traffic.ended)}")
    errors = traffic.ended.total() - traffic.ended["answered"]
    return verdict(
        [
            Bar(
                f"{drawn:.2%} of the traffic reached it from {_AFTER_S:.0f} s on, less than {_SHARE_BAR:.0%}",
                drawn < _SHARE_BAR,
            ),
            Bar(
                f"{_BACK_BAR:.0%} of its fair share {back_s:.1f} s after its repair, within {_BACK_WITHIN_S:.0f} s",
                back_s <= _BACK_WITHIN_S,
            ),
            Bar(f"{errors} of {traffic.ended.total()} callers saw an error", errors == 0),
        ]
    )


def main() -> int:
    """Reads the command line; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broken", type=float, default=20.0, metavar="SECONDS", help="how long it fails (20)")
    try:
        return asyncio.run(run(parser.parse_args().broken))
    except BenchmarkError as error:
        print(f"fast_failing: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
