"""How long a cached answer takes, with many of them kept: client to coordinator and back, over mutual TLS on loopback.

    python -m benchmarks.cache_latency --embedding-model all-MiniLM-L6-v2.F16.gguf [--entries 100000]
        [--exact 600] [--semantic 400]

The mesh is real (registry, runner with llama.cpp, coordinator), the embedding model a GGUF of all-MiniLM-L6-v2; answers
are made by a fake engine, since only their being given again is timed. All entries are of one caller and one bucket,
the worst case of the search, their vectors random but for the questions asked. The coordinator is started anew on the
filled file; the first request after that is told by itself. Then come 50 requests of each kind to warm up, and the
timed ones, one after the other in a steady state. A semantic hit's time has embedding, search and gate in it.

Beside the times of the whole stand those of its stages, the CPU time of a request, of client, coordinator and runner
together (they are one process here), and how long its event loop stood ready to run while other processes had the
cores. The bar, on the times as they are: 99% of exact hits within 5 ms, of semantic hits within 25 ms, of at least 500
and 300 hits.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from benchmarks.figures import Bar, percentile, verdict

from chorus.client import CacheMode, CacheOutcome, MeshClient
from chorus.config.sections import RegistrySettings
from chorus.coordinator import semantic
from chorus.core.fleet.records import Artifact, Feature, Tier
from chorus.engine.llama import LlamaEngine, LlamaSettings, ModelSource
from chorus.store.answers import AnswerFile, NewAnswer
from chorus.testing.engine_fake import FakeEngine, FakeModel
from chorus.testing.fake_model import FAKE_FEATURES
from chorus.testing.mesh import InProcessMesh

EXACT_MS, SEMANTIC_MS = 5.0, 25.0
_LEAST_EXACT, _LEAST_SEMANTIC = 500, 300
_WARM_UP = 50
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
    """Milliseconds of each hit and of its stages, and what the hits took of the machine."""

    hits: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    waited: list[float] = field(default_factory=list)
    cpu: float = 0.0


class Stages:
    """Takes the times of what a hit is made of, for the request under way."""

    def __init__(self) -> None:
        self.now: dict[str, float] = {}

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Times an async method of an object from now on."""
        call: Callable[..., Awaitable[Any]] = getattr(owner, method)

        async def timed(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return await call(*given, **named)
            finally:
                self.add(name, began)

        setattr(owner, method, timed)

    def watch_gate(self) -> None:
        """Times the gate, which is plain computing on the event loop."""
        best = semantic._best

        def timed(*given: Any) -> Any:
            began = time.perf_counter()
            try:
                return best(*given)
            finally:
                self.add("gate", began)

        semantic._best = timed  # type: ignore[assignment]

    def add(self, name: str, began: float) -> None:
        """Notes a stage that has just ended."""
        self.now[name] = self.now.get(name, 0.0) + (time.perf_counter() - began) * 1000.0


def waited_ms() -> float:
    """How long the event loop's thread was ready to run, and had no core, since it began; 0 where nobody knows."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e6
    except (OSError, IndexError, ValueError):
        return 0.0


async def timed(client: MeshClient, asked: Sequence[str], mode: CacheMode, stages: Stages) -> Timed:
    """Asks one question after the other."""
    found, cpu = Timed(), time.process_time()
    for question in asked:
        stages.now, before, began = {}, waited_ms(), time.perf_counter()
        answer = await client.complete(question, temperature=0.0, max_tokens=8, cache=mode)
        took, waited = (time.perf_counter() - began) * 1000.0, waited_ms() - before
        told = str(answer.cache.outcome) if answer.cache is not None else "untold"
        found.outcomes[told] = found.outcomes.get(told, 0) + 1
        if told in (CacheOutcome.EXACT, CacheOutcome.SEMANTIC):
            found.hits.append(took)
            found.waited.append(waited)
            stages.now["way and wire"] = (
                took
                - stages.now.get("embedding", 0.0)
                - sum(stages.now.get(name, 0.0) for name in ("exact look-up", "search", "gate"))
            )
            for name, spent in stages.now.items():
                found.stages.setdefault(name, []).append(spent)
    found.cpu = 1000.0 * (time.process_time() - cpu) / len(asked)
    return found


def show(name: str, found: Timed) -> None:
    """Prints one kind's times, and its stages'."""
    p50, p90, p99 = (percentile(found.hits, share) for share in (0.5, 0.9, 0.99))
    print(f"| {name} | {len(found.hits)} | {found.cpu:.2f} | {p50:.2f} | {p90:.2f} | {p99:.2f} | |")
    whole = sum(found.hits)
    for stage, times in found.stages.items():
        p50, p90, p99 = (percentile(times, share) for share in (0.5, 0.9, 0.99))
        print(f"| {name}: {stage} | {len(times)} | | {p50:.2f} | {p90:.2f} | {p99:.2f} | {sum(times) / whole:.0%} |")
    p50, p90, p99 = (percentile(found.waited, share) for share in (0.5, 0.9, 0.99))
    print(f"| {name}: no core to run on | | | {p50:.2f} | {p90:.2f} | {p99:.2f} | {sum(found.waited) / whole:.0%} |")
    alone = [hit - waited for hit, waited in zip(found.hits, found.waited, strict=True)]
    p50, p90, p99 = (percentile(alone, share) for share in (0.5, 0.9, 0.99))
    print(f"| {name}: all but that | | | {p50:.2f} | {p90:.2f} | {p99:.2f} | |")


async def measure(options: argparse.Namespace, folder: Path) -> int:
    """Fills a cache, and times its hits."""
    path = options.embedding_model
    artifact = Artifact(
        path.stem, path.name, "e" * 64, path.stat().st_size, "F16", 22_700_000, 512, "bert", Tier.MICRO, ("embedding",)
    )
    embedding = LlamaEngine([ModelSource(artifact, path)], LlamaSettings(slots=1))
    answering = FakeEngine([FakeModel(features=FAKE_FEATURES - {Feature.EMBED})])
    pairs = questions(options.semantic + _WARM_UP)
    cache = {"file": folder / "answers.sqlite", "max_entries": 10_000_000, "max_mib": 1 << 14}
    usual = RegistrySettings()
    registry = {"lease_ttl_s": usual.lease_ttl_s, "heartbeat_interval_s": usual.heartbeat_interval_s}
    stages = Stages()
    async with InProcessMesh(runners=[answering, embedding], cache=cache, registry=registry) as mesh:
        client = mesh.client()
        await client.embed("loads the model")
        await timed(client, [question for question, _ in pairs], CacheMode.SEMANTIC, stages)
        await mesh.coordinators[0].stop(0.0)
        began = time.perf_counter()
        fill(folder / "answers.sqlite", options.entries)
        print(f"filled up to {options.entries} entries in {time.perf_counter() - began:.1f} s", flush=True)
        coordinator = await mesh.restart_coordinator()
        client = mesh.client(timeout_s=300.0)
        await mesh.until(lambda directory: len(directory.entries) == 2)
        await client.list_models()
        first = await timed(client, [pairs[0][0]], CacheMode.EXACT, stages)
        began = time.perf_counter()
        store = coordinator._answers._store
        await _loaded(store, options.entries)
        print(f"first exact hit {first.hits[0]:.1f} ms; all vectors {time.perf_counter() - began:.2f} s later")
        stages.watch(store, "find", "exact look-up")
        stages.watch(store, "near", "search")
        stages.watch(coordinator._answers._semantic, "_embed", "embedding")
        stages.watch(embedding, "embed", "embedding, in the engine")
        stages.watch_gate()
        gc.collect()
        gc.freeze()  # as the services' own processes do
        warming = [pairs[place] for place in range(_WARM_UP)]
        await timed(client, [other for _, other in warming], CacheMode.SEMANTIC, stages)
        await timed(client, [question for question, _ in warming], CacheMode.EXACT, stages)
        asked = pairs[_WARM_UP:]
        exact = await timed(
            client, [asked[place % len(asked)][0] for place in range(options.exact)], CacheMode.EXACT, stages
        )
        near = await timed(client, [other for _, other in asked], CacheMode.SEMANTIC, stages)
    print(f"after {_WARM_UP} requests of each kind to warm up; load average {os.getloadavg()[0]:.1f}\n")
    print(f"| {options.entries} entries | hits | CPU ms | p50 ms | p90 ms | p99 ms | share |")
    print("|---|---|---|---|---|---|---|")
    bars = []
    for name, found, most, least in (
        ("exact", exact, EXACT_MS, _LEAST_EXACT),
        ("semantic", near, SEMANTIC_MS, _LEAST_SEMANTIC),
    ):
        show(name, found)
        p99 = percentile(found.hits, 0.99)
        bars.append(Bar(f"{name} hits: p99 {p99:.2f} ms <= {most} ms", p99 <= most))
        bars.append(Bar(f"{name} hits: {len(found.hits)} >= {least}", len(found.hits) >= least))
    print(f"outcomes: exact {exact.outcomes}, semantic {near.outcomes}")
    return verdict(bars)


async def _loaded(store: Any, entries: int) -> None:
    """Waits until the search knows all entries; nobody outside can see that."""
    while sum(map(len, store._file._nearest.values())) < entries:
        await store.count(None)


def main() -> int:
    """Returns 0 where the bars are met, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks/cache_latency.py")
    parser.add_argument("--embedding-model", type=Path, required=True)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--exact", type=int, default=600, help="exact requests to time")
    parser.add_argument("--semantic", type=int, default=400, help="semantic requests to time")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(measure(options, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
