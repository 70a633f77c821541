"""Four times as many requests as the mesh can answer: what is still answered in time, and for whom.

    make bench ONLY=overload

A registry, a coordinator and a runner with a real model, each a process of its own, over mutual TLS. At first as many
callers as the runner has slots ask one request after the other, which is the peak. Then requests come at random: as
many as that, half of them interactive and half batch; then four times as many, with the same interactive ones, one and
a half times the peak's rate batch and twice it background; and so in turns, since the machine's speed may change
meanwhile. Each class has a deadline of its own and several callers. Goodput is the tokens of answers that were whole
before their deadline; a runner is busy with the tokens that it decodes, whosever they are.
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
_FULL = {Priority.INTERACTIVE: 0.5, Priority.BATCH: 0.5}
_FOURFOLD = {Priority.INTERACTIVE: 0.5, Priority.BATCH: 1.5, Priority.BACKGROUND: 2.0}
_DEADLINE_S = {Priority.INTERACTIVE: 10.0, Priority.BATCH: 30.0, Priority.BACKGROUND: 60.0}
_GOODPUT_BAR, _BUSY_BAR = 0.9, 0.8
_SLOWER = 1.25
_GROWTH_BAR_BYTES = 16 << 20


@dataclass
class Seen:
    """What the requests of one class came to."""

    ended: Counter[str] = field(default_factory=Counter)
    tokens_in_time: int = 0
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)


@dataclass
class Book:
    """What happened in some stretches of time, warm ones alone. `decoded` are all tokens that came, whosever."""

    seconds: float = 0.0
    decoded: int = 0
    classes: dict[Priority, Seen] = field(default_factory=lambda: {priority: Seen() for priority in Priority})

    @property
    def answered_per_s(self) -> float:
        return sum(len(seen.whole_s) for seen in self.classes.values()) / self.seconds

    @property
    def decoded_per_s(self) -> float:
        return self.decoded / self.seconds

    @property
    def goodput_per_s(self) -> float:
        return sum(seen.tokens_in_time for seen in self.classes.values()) / self.seconds


class Load:
    """Requests, and what came of them, which is written into the book that is open when it happens."""

    def __init__(self, clients: list[MeshClient]) -> None:
        self._clients = clients
        self._draw = random.Random(7)
        self._number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._book = Book()

    async def measure(self, book: Book, seconds: float) -> None:
        """Keeps that book for so long."""
        began, self._book = time.monotonic(), book
        await asyncio.sleep(seconds)
        book.seconds += time.monotonic() - began
        self._book = Book()

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
                    self._book.decoded += len(event.token_ids)
        except ChorusError as error:
            ended = error.reason
        now, seen = time.monotonic(), self._book.classes[priority]
        seen.ended[ended] += 1
        if ended == "in time":
            seen.tokens_in_time += got
            seen.first_s.append(first - asked)
            seen.whole_s.append(now - asked)

    async def closed(self, book: Book, callers: int, seconds: float) -> None:
        """So many callers, each with one interactive request after the other; `book` is kept once that has settled."""

        async def ask() -> None:
            while True:
                await self.one(Priority.INTERACTIVE)

        self._tasks |= {asyncio.create_task(ask()) for _ in range(callers)}
        await asyncio.sleep(_WARM_UP_S)
        await self.measure(book, seconds)
        await self._give_up()

    async def arriving(self, book: Book, rates: dict[Priority, float], seconds: float) -> None:
        """Requests of each class at random, so many a second; `book` is kept once that has settled."""
        self._tasks |= {asyncio.create_task(self._arrive(priority, rate)) for priority, rate in rates.items()}
        await asyncio.sleep(2 * _WARM_UP_S)
        await self.measure(book, seconds)
        await self._give_up()

    async def _arrive(self, priority: Priority, rate: float) -> None:
        at = time.monotonic()
        while True:
            at += self._draw.expovariate(rate)
            await asyncio.sleep(max(at - time.monotonic(), 0.0))
            task = asyncio.create_task(self.one(priority))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _give_up(self) -> None:
        """Cancels what is still under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()


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


async def run(model: Path, seconds: float, rounds: int, threads: int) -> int:
    """Measures and prints; returns an exit status."""
    print(f"{machine()}; {model.name}, {threads} threads, {_SLOTS} slots.\n")
    peak, full, over = Book(), Book(), Book()
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as folder, processes_in(Path(folder)) as processes:
        mesh = started_mesh(processes, model, threads)
        clients = [mesh.client(name) for name in _CALLERS]
        sizes: list[dict[str, int]] = []
        try:
            say("starting a mesh")
            await mesh.until_all_serve()
            load = Load(clients)
            for number in range(1, rounds + 1):
                say(f"round {number} of {rounds}: the peak")
                await load.closed(peak, _SLOTS, seconds / 2)
                rate = peak.answered_per_s
                say(f"{rate:.1f} requests, {peak.decoded_per_s:.0f} tokens a second; now by chance, then four times it")
                for book, shares in ((full, _FULL), (over, _FOURFOLD)):
                    await load.arriving(book, {one: share * rate for one, share in shares.items()}, seconds)
                sizes.append({name: mesh.started[name].resident_bytes() for name in ("coordinator", "runner")})
        finally:
            for client in clients:
                await client.aclose()
    return report(peak, full, over, {name: sizes[-1][name] - size for name, size in sizes[0].items()})


def report(peak: Book, full: Book, over: Book, grown: dict[str, int]) -> int:
    """Prints what came of each class; returns an exit status."""
    urgent, urgent_before = over.classes[Priority.INTERACTIVE], full.classes[Priority.INTERACTIVE]
    rows = [("at the peak", peak.classes[Priority.INTERACTIVE])]
    rows += [(f"{one.value}, all of it", full.classes[one]) for one in _FULL]
    rows += [(f"{one.value}, fourfold", seen) for one, seen in over.classes.items()]
    print("| class | ended | in time | TTFT p50 / p99 | whole p50 / p99 | the others |")
    print("|---|---|---|---|---|---|")
    for name, found in rows:
        others = ", ".join(f"{count} {reason}" for reason, count in sorted(found.ended.items()) if reason != "in time")
        times = " | ".join(
            f"{percentile(values, 0.5):.2f} / {percentile(values, 0.99):.2f} s" if values else "-"
            for values in (found.first_s, found.whole_s)
        )
        print(f"| {name} | {found.ended.total()} | {found.ended['in time']} | {times} | {others or '-'} |")
    growth = ", ".join(f"{name} by {size / 2**20:+.1f} MiB" for name, size in grown.items())
    print(f"\nFrom the first round to the last, memory grew: {growth}.")
    goodput, busy = over.goodput_per_s / peak.goodput_per_s, over.decoded_per_s / peak.decoded_per_s
    slower = percentile(urgent.whole_s, 0.99) / percentile(urgent_before.whole_s, 0.99)
    in_time = urgent.ended["in time"] / max(urgent.ended.total(), 1)
    least = over.classes[Priority.BACKGROUND].ended
    return verdict(
        [
            Bar(f"goodput {goodput:.2f} of the peak's, at least {_GOODPUT_BAR}", goodput >= _GOODPUT_BAR),
            Bar(f"decoding {busy:.2f} of the peak's tokens, at least {_BUSY_BAR}", busy >= _BUSY_BAR),
            Bar(
                f"interactive: {in_time:.1%} in time (at least 99%), p99 {slower:.2f}x as before (at most {_SLOWER}x)",
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
    parser.add_argument("--seconds", type=float, default=60.0, help="how long a round is overloaded (60)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of peak and overload (3)")
    parser.add_argument("--model", type=Path, help="a GGUF file (SmolLM2, as its package carries it)")
    parser.add_argument(
        "--threads",
        type=int,
        default=max(cores() - 1, 1),
        help="threads that decode (all cores but one, which is for the callers: they are other machines in a mesh)",
    )
    arguments = parser.parse_args()
    try:
        return asyncio.run(
            run(arguments.model or default_model(), arguments.seconds, arguments.rounds, arguments.threads)
        )
    except BenchmarkError as error:
        print(f"overload: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
