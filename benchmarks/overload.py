"""Four times as many requests as the mesh can answer: what is still answered in time, and for whom.

    make bench ONLY=overload

A registry, a coordinator and a runner with a real model, each a process of its own, over mutual TLS. First as many
callers as the runner has slots ask one request after the other, which is the peak. Then requests come at random, four
times as many a second: half the peak's rate interactive, one and a half times it batch, twice it background, each class
with a deadline of its own, from several callers. Goodput is the tokens of answers that were whole before their
deadline; a runner is busy with the tokens that it decodes, whosever they are.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from figures import Bar, percentile, verdict
from meshes import Mesh, Shape
from processes import BenchmarkError, Processes, machine, processes_in, say
from servers import cores, default_model

from chorus.client import MeshClient
from chorus.core.errors import ChorusError
from chorus.core.generation import (
    GenerationRequest,
    Priority,
    Sampling,
    StopConditions,
    TextPrompt,
    TokenDelta,
)

_SLOTS = 8
_CONTEXT = 512
_LEAST, _MOST = 16, 48  # tokens of an answer
_CALLERS = ("anna", "boris", "chloe", "dmitri")
_WARM_UP_S = 10.0
_OF_PEAK = {Priority.INTERACTIVE: 0.5, Priority.BATCH: 1.5, Priority.BACKGROUND: 2.0}
_DEADLINE_S = {Priority.INTERACTIVE: 10.0, Priority.BATCH: 30.0, Priority.BACKGROUND: 60.0}
_GOODPUT_BAR, _BUSY_BAR = 0.9, 0.8
_SLOWER = 1.25
_GROWTH_BAR_BYTES = 16 << 20


@dataclass
class Seen:
    """What the requests of one class came to, once the run was warm."""

    ended: Counter[str] = field(default_factory=Counter)
    tokens_in_time: int = 0
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)


class Load:
    """Requests, and what came of them. Only what ends after `begin` counts."""

    def __init__(self, clients: list[MeshClient]) -> None:
        self._clients = clients
        self._draw = random.Random(7)
        self._number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.begin()

    def begin(self) -> None:
        """Counts from now on."""
        self.began = time.monotonic()
        self.seen = {priority: Seen() for priority in Priority}
        self.decoded = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    async def one(self, priority: Priority) -> None:
        """Asks one request and waits for its end, whatever it is."""
        self._number += 1
        number, tokens = self._number, self._draw.randint(_LEAST, _MOST)
        request = GenerationRequest(
            "",
            TextPrompt(f"Story {number}: once upon a time there was"),
            sampling=Sampling(temperature=0.0),
            stop=StopConditions(max_tokens=tokens, ignore_eos=True),
            priority=priority,
        )
        asked, first, got, ended = time.monotonic(), 0.0, 0, "in time"
        try:
            client = self._clients[number % len(self._clients)]
            async for event in client.generate(request, timeout_s=_DEADLINE_S[priority]):
                if isinstance(event, TokenDelta):
                    first = first or time.monotonic()
                    got += len(event.token_ids)
                    self.decoded += len(event.token_ids)
        except ChorusError as error:
            ended = error.reason
        now, seen = time.monotonic(), self.seen[priority]
        seen.ended[ended] += 1
        if ended == "in time":
            seen.tokens_in_time += got
            seen.first_s.append(first - asked)
            seen.whole_s.append(now - asked)

    async def closed(self, callers: int, seconds: float) -> None:
        """So many callers, each with one interactive request after the other."""

        async def ask() -> None:
            while True:
                await self.one(Priority.INTERACTIVE)

        tasks = [asyncio.create_task(ask()) for _ in range(callers)]
        await asyncio.sleep(_WARM_UP_S)
        self.begin()
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def arriving(self, rates: dict[Priority, float], seconds: float) -> None:
        """Requests of each class at random, so many a second."""
        end = time.monotonic() + seconds
        waits = {priority: time.monotonic() + self._draw.expovariate(rate) for priority, rate in rates.items() if rate}
        while (at := min(waits.values())) < end:
            await asyncio.sleep(max(at - time.monotonic(), 0.0))
            priority = min(waits, key=lambda one: waits[one])
            waits[priority] += self._draw.expovariate(rates[priority])
            task = asyncio.create_task(self.one(priority))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def give_up(self) -> None:
        """Cancels what is still under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def started_mesh(processes: Processes, model: Path, threads: int) -> Mesh:
    """A mesh of one runner with that model."""
    models = processes.folder / "models" / "bench"
    models.mkdir(parents=True)
    (models / model.name).symlink_to(model)
    environ = {
        "CHORUS_RUNNER__MODELS_DIR": str(models.parent),
        "CHORUS_RUNNER__MODELS": model.name,
        "CHORUS_RUNNER__SLOTS": str(_SLOTS),
        "CHORUS_RUNNER__CONTEXT_LENGTH": str(_CONTEXT),
        "CHORUS_RUNNER__THREADS": str(threads),
    }
    return Mesh(processes, Shape(["runner"], clients=_CALLERS, runner=None, environ=environ))


async def run(model: Path, seconds: float, threads: int) -> int:
    """Measures and prints; returns an exit status."""
    print(f"{machine()}; {model.name}, {threads} threads, {_SLOTS} slots.\n")
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as folder, processes_in(Path(folder)) as processes:
        mesh = started_mesh(processes, model, threads)
        clients = [mesh.client(name) for name in _CALLERS]
        try:
            say("starting a mesh")
            await mesh.until_all_serve()
            load = Load(clients)
            say("the peak")
            await load.closed(_SLOTS, seconds / 2)
            peak = load.seen[Priority.INTERACTIVE]
            peak_rate, peak_decoded = len(peak.whole_s) / load.seconds, load.decoded / load.seconds
            peak_goodput = peak.tokens_in_time / load.seconds
            say(f"{peak_rate:.1f} requests, {peak_decoded:.0f} tokens a second; now four times as many")
            rates = {priority: share * peak_rate for priority, share in _OF_PEAK.items()}
            await load.arriving(rates, 2 * _WARM_UP_S)
            load.begin()
            counted = {name: mesh.started[name] for name in ("coordinator", "runner")}
            before = {name: process.resident_bytes() for name, process in counted.items()}
            await load.arriving(rates, seconds)
            goodput = sum(seen.tokens_in_time for seen in load.seen.values()) / load.seconds
            busy = load.decoded / load.seconds
            seen = load.seen
            grown = {name: process.resident_bytes() - before[name] for name, process in counted.items()}
            await load.give_up()
        finally:
            for client in clients:
                await client.aclose()
    return report(peak, seen, (goodput / peak_goodput, busy / peak_decoded), grown)


def report(peak: Seen, seen: dict[Priority, Seen], shares: tuple[float, float], grown: dict[str, int]) -> int:
    """Prints what came of each class; returns an exit status."""
    print("| class | ended | in time | TTFT p50 / p99 | whole p50 / p99 | the others |")
    print("|---|---|---|---|---|---|")
    for name, found in [("at the peak", peak), *((priority.value, seen[priority]) for priority in Priority)]:
        others = ", ".join(f"{count} {reason}" for reason, count in sorted(found.ended.items()) if reason != "in time")
        times = " | ".join(
            f"{percentile(values, 0.5):.2f} / {percentile(values, 0.99):.2f} s" if values else "-"
            for values in (found.first_s, found.whole_s)
        )
        print(f"| {name} | {found.ended.total()} | {found.ended['in time']} | {times} | {others or '-'} |")
    goodput, busy = shares
    print(
        f"\nMemory grew by {', '.join(f'{size / 2**20:+.1f} MiB ({process.name})' for process, size in grown.items())}."
    )
    urgent = seen[Priority.INTERACTIVE]
    slower = percentile(urgent.whole_s, 0.99) / percentile(peak.whole_s, 0.99)
    in_time = urgent.ended["in time"] / max(urgent.ended.total(), 1)
    least = seen[Priority.BACKGROUND].ended
    return verdict(
        [
            Bar(f"goodput {goodput:.2f} of the peak's, at least {_GOODPUT_BAR}", goodput >= _GOODPUT_BAR),
            Bar(f"decoding {busy:.2f} of the peak's tokens, at least {_BUSY_BAR}", busy >= _BUSY_BAR),
            Bar(
                f"interactive: {in_time:.1%} in time (at least 99%), p99 {slower:.2f}x the peak's (at most {_SLOWER}x)",
                in_time >= 0.99 and slower <= _SLOWER,
            ),
            Bar(
                f"background starves: {least['in time']} of {least.total()} answered",
                least["in time"] <= 0.1 * max(least.total(), 1),
            ),
            Bar("memory does not grow", max(grown.values()) <= _GROWTH_BAR_BYTES),
        ]
    )


def main() -> int:
    """Reads the command line; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long it is overloaded (60)")
    parser.add_argument("--model", type=Path, help="a GGUF file (SmolLM2, as its package carries it)")
    parser.add_argument("--threads", type=int, default=cores(), help="threads that decode (all cores)")
    arguments = parser.parse_args()
    try:
        return asyncio.run(run(arguments.model or default_model(), arguments.seconds, arguments.threads))
    except BenchmarkError as error:
        print(f"overload: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
