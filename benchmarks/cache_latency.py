"""How long a cached answer takes, with many of them kept: client to coordinator and back, over mutual TLS on loopback.

    python benchmarks/cache_latency.py --embedding-model all-MiniLM-L6-v2.F16.gguf [--entries 100000]
        [--exact 600] [--semantic 400] [--source OTHER/services]

Client, coordinator, registry and two runners are processes of their own, as they are in life: one runner has the
embedding model, a GGUF of all-MiniLM-L6-v2 in llama.cpp, and one makes the answers, by a fake engine, since only their
being given again is timed. All entries are of one caller and one bucket, the worst case of the search, their vectors
random but for the questions asked. The coordinator is started anew on the filled file; the first request after that is
told by itself. Then come 50 requests of each kind to warm up, and the timed ones, one after the other in a steady
state. A semantic hit's time has embedding, search and gate in it; the embedding is timed by itself as well, as a call
of Embed, and so is the smallest call there is, by which the way alone can be judged.

Beside the times stand the CPU time of each process for a request, and how long the three processes stood ready to run
while others had the cores, which on a machine with other work is most of a tail. `--source` measures the services of
another checkout. The bar, on the times as they are: 99% of exact hits within 5 ms, of semantic hits within 25 ms, of at
least 500 and 300 hits.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from figures import Bar, percentile, verdict
from meshes import Mesh, Shape
from processes import Started, machine, processes_in, say

from chorus.client import CacheMode, CacheOutcome, Completion, MeshClient
from chorus.core.errors import ChorusError
from chorus.store.answers import AnswerFile, NewAnswer

EXACT_MS, SEMANTIC_MS = 5.0, 25.0
_LEAST_EXACT, _LEAST_SEMANTIC = 500, 300
_WARM_UP = 50
_CALLS = 200
_EMBEDDING, _FAMILY = "embedding", "all-minilm-l6-v2"
_RUNNER = f"""
import sys
from chorus.config import load_config
from chorus.runner.main import run
from chorus.testing.service import make_fake_engine
config = load_config()
given = {{}} if config.runner.name == "{_EMBEDDING}" else {{"make_engine": make_fake_engine}}
sys.exit(run(config, **given))
"""
_THINGS = ("harbour", "museum", "station", "library", "market", "theatre", "stadium", "airport", "cathedral", "park")


def questions(count: int) -> list[tuple[str, str]]:
    """Questions, each with another way to ask it."""
    found = []
    for number in range(count):
        thing = f"{_THINGS[number % len(_THINGS)]} of town {number}"
        found.append((f"When does the {thing} open?", f"Could you tell me when the {thing} opens?"))
    return found


def fill(path: Path, entries: int) -> None:
    """Copies one row of a file with random vectors, until there are so many entries more."""
    file = AnswerFile(path, max_entries=10 * entries, max_bytes=1 << 34)
    row = "SELECT key, sha256, caller, answer, bucket FROM answers WHERE bucket NOT NULL LIMIT 1"
    key, sha, caller, answer, bucket = file._db.execute(row).fetchone()
    vectors = np.random.default_rng(1).standard_normal((entries, 384), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    base = NewAnswer(key, sha, caller, answer, 8, "", bucket)
    with file._db:  # a transaction for each, as put() has them, would take minutes
        for number, vector in enumerate(vectors):
            asked = f"What is filler {number}?"
            file._insert(replace(base, key=f"filler-{number}", question=asked, vector=vector), 2048, 1e12)
    file.close()


@dataclass
class Timed:
    """Milliseconds of each call, and, for a call, of CPU by process and of waiting for a core."""

    times: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    cpu: dict[str, float] = field(default_factory=dict)
    waited: float = 0.0


class Meter:
    """Times calls, and what they take of the client's, the coordinator's and the embedding runner's process.

    What the kernel counted is read before the calls and after them: files of every thread, read between two, would
    have the next one begin with nothing of its own in the processor's caches.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._started: dict[str, Started] = {name: mesh.started[name] for name in ("coordinator", _EMBEDDING)}

    async def take(self, calls: Sequence[Callable[[], Awaitable[object]]]) -> Timed:
        """Makes one call after the other. Of completions, hits alone are timed."""
        found, before, waited, cpu = Timed(), self._cpu(), self._waited_ms(), time.process_time()
        for call in calls:
            began = time.perf_counter()
            answer = await call()
            took = (time.perf_counter() - began) * 1000.0
            if isinstance(answer, Completion):
                told = answer.cache.outcome if answer.cache is not None else None
                found.outcomes[str(told)] += 1
                if told not in (CacheOutcome.EXACT, CacheOutcome.SEMANTIC):
                    continue
            found.times.append(took)
        used = {"client": time.process_time() - cpu}
        used |= {name: seconds - before[name] for name, seconds in self._cpu().items()}
        found.cpu = {name: 1000.0 * seconds / len(calls) for name, seconds in used.items()}
        found.waited = (self._waited_ms() - waited) / len(calls)
        return found

    def _cpu(self) -> dict[str, float]:
        return {name: started.cpu_s() for name, started in self._started.items()}

    def _waited_ms(self) -> float:
        pids = (os.getpid(), *(started.pid for started in self._started.values()))
        return sum(_waited_ms(task) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir())


def _waited_ms(task: Path) -> float:
    """How long a thread was ready to run, and had no core, since it began; 0 where nobody knows."""
    try:
        return int((task / "schedstat").read_text().split()[1]) / 1e6
    except (OSError, IndexError, ValueError):
        return 0.0


def show(name: str, found: Timed) -> None:
    """Prints the times of one kind of call."""
    cells = [f"{percentile(found.times, share):.2f}" for share in (0.5, 0.9, 0.99)]
    cpu = [f"{found.cpu[process]:.2f}" for process in ("client", "coordinator", _EMBEDDING)]
    print(f"| {name} | {len(found.times)} | {' | '.join((*cells, *cpu))} | {found.waited:.2f} |")


async def measure(options: argparse.Namespace, mesh: Mesh, answers: Path) -> int:
    """Fills a cache, and times its hits."""
    pairs = questions(options.semantic + _WARM_UP)
    say("asking each question once")
    async with mesh.client() as client:
        await until_both_serve(client)
        await client.embed("loads the model", model=_FAMILY)
        for question, _ in pairs:
            await ask(client, question, CacheMode.SEMANTIC)
    await mesh.stop("coordinator")
    began = time.perf_counter()
    fill(answers, options.entries)
    say(f"filled up to {options.entries} entries in {time.perf_counter() - began:.1f} s")
    mesh.start("coordinator", source=options.source)
    gc.collect()
    gc.freeze()  # as the services' own processes do
    async with mesh.client() as client:
        await until_both_serve(client)
        meter = Meter(mesh)
        first = await meter.take([lambda: ask(client, pairs[0][0], CacheMode.EXACT)])
        for question, other in pairs[:_WARM_UP]:
            await ask(client, other, CacheMode.SEMANTIC)
            await ask(client, question, CacheMode.EXACT)
        asked = pairs[_WARM_UP:]
        least = await meter.take([client.list_models] * _CALLS)
        embedding = await meter.take(
            [lambda other=other: client.embed(other, model=_FAMILY) for _, other in asked[:_CALLS]]
        )
        exact = await meter.take(
            [
                lambda place=place: ask(client, asked[place % len(asked)][0], CacheMode.EXACT)
                for place in range(options.exact)
            ]
        )
        near = await meter.take([lambda other=other: ask(client, other, CacheMode.SEMANTIC) for _, other in asked])
    print(f"{machine()}; at the end {os.getloadavg()[0]:.1f}. First exact hit after a start {first.times[0]:.1f} ms.\n")
    print(
        f"| {options.entries} entries | calls | p50 ms | p90 | p99 | CPU ms: client | coordinator | runner | no core |"
    )
    print("|---" * 9 + "|")
    show("ListModels", least)
    show("Embed", embedding)
    show("exact hit", exact)
    show("semantic hit", near)
    print(f"\nOutcomes: exact {dict(exact.outcomes)}, semantic {dict(near.outcomes)}.")
    bars = []
    for name, found, most, count in (
        ("exact", exact, EXACT_MS, _LEAST_EXACT),
        ("semantic", near, SEMANTIC_MS, _LEAST_SEMANTIC),
    ):
        p99 = percentile(found.times, 0.99)
        bars.append(Bar(f"{name} hits: p99 {p99:.2f} ms <= {most} ms", p99 <= most))
        bars.append(Bar(f"{name} hits: {len(found.times)} >= {count}", len(found.times) >= count))
    return verdict(bars)


async def until_both_serve(client: MeshClient) -> None:
    """Returns once the coordinator knows the model that answers and the one that embeds."""
    while True:
        with contextlib.suppress(ChorusError):
            if len((await client.list_models()).models) == 2:
                return
        await asyncio.sleep(0.1)


async def ask(client: MeshClient, question: str, mode: CacheMode) -> Completion:
    """A short answer, by the cache if it has one."""
    return await client.complete(question, model="fake-1b", temperature=0.0, max_tokens=8, cache=mode)


def shape_of(options: argparse.Namespace, folder: Path) -> Shape:
    """The mesh, for which `folder` holds the embedding model and the answers."""
    models = folder / "models" / _FAMILY
    models.mkdir(parents=True)
    (models / options.embedding_model.name).symlink_to(options.embedding_model.resolve())
    environ = {
        "CHORUS_CACHE__FILE": str(folder / "answers.sqlite"),
        "CHORUS_CACHE__MAX_ENTRIES": "10000000",
        "CHORUS_CACHE__MAX_MIB": str(1 << 14),
        "CHORUS_CACHE__EMBEDDING_MODEL": _FAMILY,
        "CHORUS_RUNNER__MODELS_DIR": str(models.parent),
        "CHORUS_RUNNER__MODELS": "[]",
    }
    return Shape(runners=("answering", _EMBEDDING), runner=_RUNNER, environ=environ)


async def run(options: argparse.Namespace) -> int:
    """Measures and prints; returns an exit status."""
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as name, processes_in(Path(name)) as processes:
        folder = Path(name)
        mesh = Mesh(processes, shape_of(options, folder), source=options.source)
        return await measure(options, mesh, folder / "answers.sqlite")


def main() -> int:
    """Returns 0 where the bars are met, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks/cache_latency.py")
    parser.add_argument("--embedding-model", type=Path, required=True)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--exact", type=int, default=600, help="exact requests to time")
    parser.add_argument("--semantic", type=int, default=400, help="semantic requests to time")
    parser.add_argument("--source", type=Path, help="measure the services in this folder")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
