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
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from figures import Bar, percentile, verdict
from processes import BenchmarkError, Processes, Started, free_port, machine, processes_in, say
from servers import Shape, cores, default_model, mesh_environ

from chorus.client import MeshClient
from chorus.config.address import Endpoint
from chorus.core.errors import ChorusError
from chorus.core.generation import (
    GenerationRequest,
    Priority,
    Requirements,
    Sampling,
    StopConditions,
    TextPrompt,
    TokenDelta,
)
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.transport import TlsIdentity

_SLOTS = 8
_CONTEXT = 512
_LEAST, _MOST = 16, 48  # tokens of an answer
_CALLERS = 4
_READY_S = 120.0
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


@contextlib.asynccontextmanager
async def started_mesh(processes: Processes, shape: Shape) -> AsyncIterator[tuple[list[MeshClient], list[Started]]]:
    """Clients of a mesh of one runner, and the processes whose memory counts."""
    certificates, folder = MeshCertificates(), processes.folder
    callers = [f"caller-{number}" for number in range(_CALLERS)]
    for role, names in (
        (Role.REGISTRY, ["registry"]),
        (Role.COORDINATOR, ["coordinator"]),
        (Role.RUNNER, ["runner"]),
        (Role.CLIENT, callers),
    ):
        for name in names:
            certificates.leaf(role, name).write(folder)
    models = folder / "models" / "bench"
    models.mkdir(parents=True)
    (models / shape.model.name).symlink_to(shape.model)
    registry, coordinator = free_port(), free_port()
    environ = mesh_environ(folder, certificates) | {
        "CHORUS_REGISTRY__LISTEN": f"127.0.0.1:{registry}",
        "CHORUS_COORDINATOR__LISTEN": f"127.0.0.1:{coordinator}",
        "CHORUS_COORDINATOR__REGISTRIES": f"127.0.0.1:{registry}",
        "CHORUS_RUNNER__NAME": "runner",
        "CHORUS_RUNNER__LISTEN": "127.0.0.1:0",
        "CHORUS_RUNNER__REGISTRIES": f"127.0.0.1:{registry}",
        "CHORUS_RUNNER__MODELS_DIR": str(folder / "models"),
        "CHORUS_RUNNER__MODELS": shape.model.name,
        "CHORUS_RUNNER__SLOTS": str(shape.slots),
        "CHORUS_RUNNER__CONTEXT_LENGTH": str(shape.context_length),
        "CHORUS_RUNNER__THREADS": str(shape.threads),
    }
    started = [
        processes.start(name, [sys.executable, "-m", "chorus.cli.main", name], environ)
        for name in ("registry", "coordinator", "runner")
    ]
    endpoint = Endpoint.parse(f"127.0.0.1:{coordinator}")
    clients = [
        MeshClient([endpoint], identity=TlsIdentity.load(folder / f"{Role.CLIENT.value}-{name}")) for name in callers
    ]
    try:
        await _until_it_answers(clients[0], started)
        yield clients, started[1:]
    finally:
        for client in clients:
            await client.aclose()


async def _until_it_answers(client: MeshClient, started: list[Started]) -> None:
    say("starting a mesh")
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            await client.complete("Once upon a time", max_tokens=2)
            return
        except ChorusError as error:
            for process in started:
                process.check()
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the mesh did not answer within {_READY_S:.0f} s: {error.message}") from None
        await asyncio.sleep(0.2)


async def run(model: Path, seconds: float, threads: int) -> int:
    """Measures and prints; returns an exit status."""
    print(f"{machine()}; {model.name}, {threads} threads, {_SLOTS} slots.\n")
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as folder, processes_in(Path(folder)) as processes:
        async with started_mesh(processes, Shape(model, _SLOTS, _CONTEXT, threads)) as (clients, started):
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
            before = [process.resident_bytes() for process in started]
            await load.arriving(rates, seconds)
            goodput = sum(seen.tokens_in_time for seen in load.seen.values()) / load.seconds
            busy = load.decoded / load.seconds
            seen = load.seen
            grown = [process.resident_bytes() - old for process, old in zip(started, before, strict=True)]
            await load.give_up()
    return report(peak, seen, (goodput / peak_goodput, busy / peak_decoded), dict(zip(started, grown, strict=True)))


def report(peak: Seen, seen: dict[Priority, Seen], shares: tuple[float, float], grown: dict[Started, int]) -> int:
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
                f"interactive: {in_time:.1%} in time, at least 99%, and p99 {slower:.2f}x the peak's, at most {_SLOWER}x",
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
