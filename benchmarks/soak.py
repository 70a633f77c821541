"""Steady mixed load with a random fault every 20 seconds: is every admitted request answered, and is memory flat?

    .venv/bin/python benchmarks/soak.py --minutes 60

Three runners with the fake engine, two registries and two coordinators, each a process of its own, over mutual TLS; a
Python client asks for interactive and batch streams, whole answers, vectors, rankings and token counts, and breaks
streams off. A runner is killed, frozen or cut off, a coordinator or a registry is killed, by chance, every 20 s.

Answered: each request that the mesh took ends with its answer, whose tokens are all checked; a refusal for load is no
admission, and is counted. Flat: a process that lived three minutes or more has grown since its first minute by no more
than 10% and 10 MiB of resident memory; the client's own is measured since its second minute. A line a minute is logged.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from failover import ENVIRON, SHAPE
from figures import Bar, verdict
from meshes import Mesh, Shape
from oracle import ask, right_ids
from processes import BenchmarkError, machine, processes_in

from chorus.client import AttemptChanged, MeshClient, StartedAt
from chorus.core.errors import ChorusError, OverloadedError
from chorus.core.generation import Priority, TokenDelta
from faults import Faults, Ways

_FAULT_EVERY_S = 20.0
_LONGEST_S = 60.0
_SETTLED_S, _LIFE_S = 60.0, 180.0
_GROWTH, _GROWTH_BYTES = 0.10, 10 * 2**20
_PAGE = os.sysconf("SC_PAGE_SIZE")
# How many callers of each kind there are, and how long each rests after an answer, in seconds.
_CALLERS = {
    "interactive": (2, 0.5),
    "batch": (1, 1.0),
    "whole": (1, 1.0),
    "embed": (1, 0.5),
    "rerank": (1, 1.0),
    "count": (1, 0.5),
    "cancel": (1, 1.0),
}


class Load:
    """Callers that ask all the time. `done` counts answers by kind, `wrong` what was none."""

    def __init__(self, client: MeshClient, draw: random.Random) -> None:
        self._client = client
        self._draw = draw
        self._numbers = itertools.count()
        self._now_on: dict[int, str] = {}
        self.done: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.refused = 0
        self.carried: Counter[str] = Counter()
        self.told: list[str] = []
        kinds: dict[str, Callable[[int, str], Awaitable[None]]] = {
            "interactive": self._interactive,
            "batch": self._batch,
            "whole": self._whole,
            "embed": self._embed,
            "rerank": self._rerank,
            "count": self._count,
            "cancel": self._cancel,
        }
        places = itertools.count()
        self._tasks = [
            asyncio.create_task(self._repeat(kind, kinds[kind], next(places), rest_s))
            for kind, (count, rest_s) in _CALLERS.items()
            for _ in range(count)
        ]

    def busy(self) -> Counter[str]:
        """How many streams each runner has now."""
        return Counter(self._now_on.values())

    async def stop(self) -> None:
        """Ends it. Raises what is the benchmark's own fault."""
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    async def _repeat(self, kind: str, one: Callable[[int, str], Awaitable[None]], place: int, rest_s: float) -> None:
        while True:
            try:
                async with asyncio.timeout(_LONGEST_S):
                    await one(place, f"{kind} {next(self._numbers)}")
                self.done[kind] += 1
            except OverloadedError:
                self.refused += 1
            except ChorusError as error:
                self._failed(f"{kind}: {error.reason}", error.message)
            except TimeoutError:
                self._failed(f"{kind}: hung", f"{kind} took over {_LONGEST_S:.0f} s")
            finally:
                self._now_on.pop(place, None)
            await asyncio.sleep(rest_s * self._draw.uniform(0.5, 1.5))

    def _failed(self, what: str, why: str) -> None:
        self.wrong[what] += 1
        self.told.append(f"{time.strftime('%H:%M:%S')} {what}: {why}")
        print(f"  FAILED {self.told[-1]}", flush=True)

    async def _stream(self, place: int, text: str, priority: Priority, after: int = 10**9) -> None:
        right, got = await right_ids(text), list[int]()
        async with self._client.generate(replace(ask(text), priority=priority)) as generation:
            async for event in generation:
                if isinstance(event, StartedAt):
                    self._now_on[place] = event.origin.runner_id
                elif isinstance(event, AttemptChanged):
                    self._now_on[place] = event.runner_id
                    self.carried["coordinator" if event.coordinator else "runner"] += 1
                elif isinstance(event, TokenDelta):
                    got += event.token_ids
                    if len(got) >= after:
                        right = right[: len(got)]
                        break
        if got != right:
            self._failed("tokens", f"{text}: {len(got)} tokens came, which are not the {len(right)} right ones")

    async def _interactive(self, place: int, text: str) -> None:
        await self._stream(place, text, Priority.INTERACTIVE)

    async def _batch(self, place: int, text: str) -> None:
        await self._stream(place, text, Priority.BATCH)

    async def _cancel(self, place: int, text: str) -> None:
        await self._stream(place, text, Priority.INTERACTIVE, after=self._draw.randrange(1, 30))

    async def _whole(self, _place: int, text: str) -> None:
        answer = await self._client.complete(ask(f"echo:{text}"))
        if answer.text != text:
            self._failed("whole", f"{answer.text!r} came for {text!r}")

    async def _embed(self, _place: int, text: str) -> None:
        answer = await self._client.embed([text, "another text"])
        if len(answer.embeddings) != 2:
            self._failed("embed", "vectors are missing")

    async def _rerank(self, _place: int, text: str) -> None:
        answer = await self._client.rerank(text, [text, "nothing of it"])
        if [found.index for found in answer.documents] != [0, 1]:
            self._failed("rerank", "documents in the wrong order")

    async def _count(self, _place: int, text: str) -> None:
        answer = await self._client.count_tokens(ask(text))
        if answer.token_count != len(text.encode()) + 1:
            self._failed("count", f"{answer.token_count} tokens of {text!r}")


@dataclass
class _Life:
    """One process: when it began to be watched, and what it took after a minute and now, in bytes."""

    name: str
    began: float
    settled: int = 0
    last: int = 0
    seen_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def judged(self) -> bool:
        """Whether it lived long enough."""
        return bool(self.settled) and self.seen_s >= _LIFE_S

    @property
    def grown(self) -> bool:
        """Whether it has grown by more than it may."""
        return self.last > self.settled * (1 + _GROWTH) and self.last > self.settled + _GROWTH_BYTES


@dataclass
class Memory:
    """Every process that there was, by pid."""

    mesh: Mesh
    lives: dict[int, _Life] = field(default_factory=dict)
    cpu_s: float = 0.0  # of all processes since the last time it was taken

    def look(self) -> None:
        """Takes everybody's memory and CPU time now."""
        now = time.monotonic()
        pids = {started.pid: name for name, started in self.mesh.started.items()}
        for pid, name in {os.getpid(): "client", **pids}.items():
            try:
                resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
                spent = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / 100
            except (OSError, IndexError):
                continue  # it was killed this moment
            life = self.lives.setdefault(pid, _Life(name, now))
            life.seen_s, life.last = now - life.began, resident
            self.cpu_s += spent - life.cpu_s
            life.cpu_s = spent
            if not life.settled and life.seen_s >= _SETTLED_S * (2 if name == "client" else 1):
                life.settled = resident

    def largest(self) -> str:
        """What each process takes now."""
        now = {life.name: life.last for life in self.lives.values()}
        return ", ".join(f"{name} {size / 2**20:.0f}" for name, size in sorted(now.items()))


async def run(minutes: float, draw: random.Random) -> int:
    """Runs it all and logs it; returns an exit status."""
    print(f"{machine()}; {minutes:g} minutes, a fault every {_FAULT_EVERY_S:.0f} s.\n", flush=True)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="chorus-bench-"))
        processes = stack.enter_context(processes_in(Path(folder)))
        ways = Ways()
        own = await ways.lay(Shape(**SHAPE), stack)
        mesh = Mesh(processes, Shape(**SHAPE, environ=ENVIRON, own=own))
        ways.lead(mesh)
        await mesh.until_all_serve()
        client = await stack.enter_async_context(mesh.client(timeout_s=_LONGEST_S))
        load, memory = Load(client, draw), Memory(mesh)
        faults = Faults(mesh, ways, load.busy, draw)
        happened: Counter[str] = Counter()
        logging = asyncio.create_task(_log(load, memory, happened))
        try:
            await _disturb(mesh, faults, happened, 60 * minutes, draw)
        finally:
            logging.cancel()
        await load.stop()
        memory.look()
        return verdict(_bars(load, memory, happened, minutes))


async def _disturb(mesh: Mesh, faults: Faults, happened: Counter[str], seconds: float, draw: random.Random) -> None:
    """A fault every so often; the one before is repaired by then, or the next one is late."""
    began = time.monotonic()
    for number in itertools.count(1):
        due = began + number * _FAULT_EVERY_S
        if due >= began + seconds:
            await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
            return
        await mesh.until_all_serve()
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        kind = draw.choice(sorted(faults.kinds))
        await faults.kinds[kind]()
        happened[kind] += 1


async def _log(load: Load, memory: Memory, happened: Counter[str]) -> None:
    """A line a minute; memory is looked at more often, so that the short-lived are seen."""
    last = time.monotonic()
    for minute in itertools.count(1):
        for _ in range(12):
            await asyncio.sleep(5.0)
            memory.look()
        took_s, last = time.monotonic() - last, time.monotonic()
        answered = ", ".join(f"{count} {kind}" for kind, count in load.done.items())
        print(
            f"{time.strftime('%H:%M')} minute {minute}: answered {answered}; failed {load.wrong.total()}, refused "
            f"{load.refused}; carried over {dict(load.carried)}; faults {dict(happened)}; MiB: {memory.largest()}; "
            f"{memory.cpu_s / took_s:.2f} cores",
            flush=True,
        )
        memory.cpu_s = 0.0


def _bars(load: Load, memory: Memory, happened: Counter[str], minutes: float) -> list[Bar]:
    judged = [life for life in memory.lives.values() if life.judged]
    grown = [f"{life.name} {life.settled / 2**20:.0f} to {life.last / 2**20:.0f} MiB" for life in judged if life.grown]
    most = max((life.last / life.settled - 1 for life in judged), default=0.0)
    longest = max((life.seen_s for life in judged), default=0.0)
    failed = load.wrong.total()
    expected = 60 * minutes / _FAULT_EVERY_S
    return [
        Bar(f"{load.done.total()} requests answered, {failed} of those admitted were not: {dict(load.wrong) or ''}",
            not failed and load.done.total() > 0),
        Bar(f"{happened.total()} faults, a fault every {_FAULT_EVERY_S:.0f} s: {dict(happened)}",
            happened.total() >= 0.8 * expected - 1),
        Bar(f"memory flat in {len(judged)} lives of processes of 3 minutes to {longest / 60:.0f}: the most grown is "
            f"{most:+.1%} {grown or ''}", bool(judged) and not grown),
    ]  # fmt: skip


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="four minutes: does it run at all?")
    chosen = parser.parse_args()
    return asyncio.run(run(4.0 if chosen.quick else chosen.minutes, random.Random(chosen.seed)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit(130)
