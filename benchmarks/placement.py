"""How long one placement decision takes over a mesh of a thousand runners: 200 us at most, at the 99th percentile.

    .venv/bin/python benchmarks/placement.py

Two models on every runner, loads and rates that differ, a prompt that some runners have read the beginning of, a few
open breakers; and, as in a running mesh, a directory with new loads for everybody now and then. A decision is all that
a coordinator does to choose: the situation, the pool, the choice. Decisions are timed in rounds, over some ten seconds,
and the middle round by its 99th percentile counts, since others use the machine too; the processor's own time is told
beside the clock's, and how far apart the rounds are.
"""

from __future__ import annotations

import argparse
import random
import time
from types import MappingProxyType

from figures import Bar, percentile, verdict

from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import (
    Artifact,
    Cpu,
    EngineInfo,
    EngineKind,
    Feature,
    Load,
    ModelLoad,
    ModelState,
    ModelStatus,
    Node,
    Runner,
    RunnerRecord,
    RunnerState,
    Tier,
)
from chorus.core.generation import GenerationRequest, TextPrompt
from chorus.core.placement import Affinity, InFlight, Needs, Roster, Situation, place, trace_of
from chorus.core.resilience.breakers import Breakers, Outcome
from chorus.core.resilience.failures import Failures

_BAR_US = 200.0
_ROUNDS = 45
_DECISIONS = 2000
# A decision in so many comes after the directory has changed: a registry's deltas come ten times a second.
_DECISIONS_PER_CHANGE = 500
_MODELS = ("alpha", "beta")
_ENGINE = EngineInfo("llama.cpp", "1", EngineKind.LOCAL, ("cuda",))


def _status(family: str) -> ModelStatus:
    artifact = Artifact(
        family, f"{family}.gguf", "ab" * 32, 1 << 30, "Q8_0", 10**9, 8192, "llama", Tier.SMALL, ("chat",)
    )
    return ModelStatus(artifact, "llama.cpp", ModelState.LOADED, frozenset(Feature), 8192, 4)


def _mesh(count: int, rng: random.Random, version: int, before: Directory | None = None) -> Directory:
    """A directory with new loads for everybody; the runners are those of the one `before` it, as a coordinator decodes
    them."""
    entries: dict[str, DirectoryEntry] = {}
    for number in range(count):
        name = f"runner-{number:04}"
        node = Node(f"node-{number:04}", name, "linux", Cpu("cpu", 8, 16), 64 << 30, 32 << 30)
        models = tuple(map(_status, _MODELS))
        runner = Runner(name, 1, node.node_id, "10.0.0.1:7201", f"{name}.runner.test", "1", (_ENGINE,), models)
        known = before.get(name) if before is not None else None
        runner = known.record.runner if known is not None else runner
        loads = tuple(
            ModelLoad(
                f"{family}.gguf", rng.randrange(5), 4, rng.randrange(3), rng.randrange(4000), 32_768,
                rng.uniform(10, 60), rng.randrange(8000), rng.uniform(200, 2000),
            )
            for family in _MODELS
        )  # fmt: skip
        entries[name] = DirectoryEntry(RunnerRecord(runner, node, RunnerState.READY, Load(loads), version), 0.0)
    return Directory(version, MappingProxyType(entries), synced=True)


class _Coordinator:
    """What a coordinator knows when it chooses."""

    def __init__(self, count: int) -> None:
        self.rng = random.Random(1)
        first = _mesh(count, self.rng, 1)
        self.directories = [first, _mesh(count, self.rng, 2, first)]
        self.roster, self.in_flight, self.failures = Roster(), InFlight(), Failures()
        self.breakers, self.affinity = Breakers(), Affinity()
        system = "You are a helpful assistant of a household. " * 60
        request = GenerationRequest("alpha", TextPrompt(system + "What is the weather like?"))
        self.needs = Needs.of_generation(request)
        self.trace = trace_of(request, self.needs.likely_prompt_tokens)
        names = sorted(self.directories[0].entries)
        for name in self.rng.sample(names, 20):
            self.affinity.sent((name, "alpha.gguf"), 1, self.trace)
            self.in_flight.began(name, 0.0)
        for name in names[:5]:
            self.failures.failed(name, 1, 0.0)
            for _ in range(5):
                self.breakers.ended(self.breakers.began(name, "alpha.gguf", 1, 0.0), Outcome.BAD, 0.0)

    def follow(self, older: Directory, newer: Directory) -> None:
        """What placement does when a registry has told something."""
        self.roster.follow(newer.changes_since(older), newer)

    def decide(self, directory: Directory) -> str:
        situation = Situation(
            in_flight=self.in_flight.unreported,
            barred=self.breakers.barred(1.0),
            penalties=self.failures.penalties(1.0),
            shared=self.affinity.shared(self.trace),
        )
        pool = self.roster.pool(self.needs, directory)
        return place(self.needs, directory, rng=self.rng, situation=situation, pool=pool).runner_id


def main() -> int:
    """Prints the figures; exits with 1 where the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runners", type=int, default=1000)
    count = parser.parse_args().runners
    coordinator = _Coordinator(count)
    chosen = {coordinator.decide(coordinator.directories[0]) for _ in range(1000)}
    rounds: list[tuple[float, float, float]] = []
    changes: list[float] = []
    follows: list[float] = []
    latest = coordinator.directories[0]
    for number in range(_ROUNDS):
        clock: list[float] = []
        processor: list[float] = []
        for decision in range(_DECISIONS):
            directory = coordinator.directories[(number * _DECISIONS + decision) // _DECISIONS_PER_CHANGE % 2]
            if directory is not latest:
                used = time.thread_time()
                coordinator.follow(latest, directory)
                follows.append(1e6 * (time.thread_time() - used))
                latest = directory
            began, used = time.perf_counter(), time.thread_time()
            coordinator.decide(directory)
            processor.append(1e6 * (time.thread_time() - used))
            clock.append(1e6 * (time.perf_counter() - began))
            if decision % _DECISIONS_PER_CHANGE == 0:
                changes.append(processor[-1])
        rounds.append((percentile(clock, 0.99), percentile(clock, 0.5), percentile(processor, 0.99)))
    rounds.sort()
    p99, p50, used_p99 = rounds[_ROUNDS // 2]
    print(f"{count} runners, {_ROUNDS} rounds of {_DECISIONS} decisions; the first 1000 went to {len(chosen)} of them")
    print(
        f"one decision: p50 {p50:.0f} us, p99 {p99:.0f} us (of the processor: p99 {used_p99:.0f} us); "
        f"p99 of the best round {rounds[0][0]:.0f} us, of the worst {rounds[-1][0]:.0f} us"
    )
    print(
        f"the first one after the directory has changed: {sorted(changes)[len(changes) // 2]:.0f} us of the processor; "
        f"following a change of all loads, before it: {sorted(follows)[len(follows) // 2]:.0f} us"
    )
    return verdict(
        [Bar(f"a decision takes {_BAR_US:.0f} us at most, at the 99th percentile: {p99:.0f} us", p99 <= _BAR_US)]
    )


if __name__ == "__main__":
    raise SystemExit(main())
