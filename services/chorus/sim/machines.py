"""Simulated machines: unequal, and some of them in trouble for a while."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import TYPE_CHECKING

from chorus.core.fleet.directory import DirectoryEntry
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

if TYPE_CHECKING:
    from chorus.sim.world import Job

MODEL = "sim-7b"
ARTIFACT = f"{MODEL}.gguf"
# A stream among others is slower than one alone, by this share where all slots are taken.
_CROWDING = 0.5
_SMOOTHING = 0.2
_STATUS = ModelStatus(
    Artifact(MODEL, ARTIFACT, "5e" * 32, 4 << 30, "Q4_K_M", 7 * 10**9, 8192, "llama", Tier.SMALL, ("chat",)),
    "llama.cpp",
    ModelState.LOADED,
    frozenset(Feature),
    8192,
    1,
)
_ENGINE = EngineInfo("llama.cpp", "1", EngineKind.LOCAL, ("cuda",))


def coordinator_name(number: int) -> str:
    """What machines call a coordinator in their reports."""
    return f"coordinator-{number}"


class Trouble(StrEnum):
    """What may be wrong with a machine."""

    FAILS = "fails"  # it answers every request at once with an error
    SLOW = "slow"  # it takes five times as long
    DEAD = "dead"  # it is gone, with all that ran there


SLOWNESS = 5.0


@dataclass(slots=True, eq=False)
class Machine:
    """One node with one runner. `rate` is the tokens a second of a stream that has it for itself.

    `trouble` is what is wrong with it now; `measured`, what it reports of its rate: a fading mean of what streams got.
    """

    name: str
    rate: float
    slots: int
    trouble: Trouble | None = None
    running: set[Job] = field(default_factory=set)
    queue: deque[Job] = field(default_factory=deque)
    measured: float = 0.0
    sequence: int = 0

    def seconds(self, tokens: int) -> float:
        """How long a stream of so many tokens takes that begins now."""
        slowness = SLOWNESS if self.trouble is Trouble.SLOW else 1.0
        return slowness * tokens / self.rate * (1.0 + _CROWDING * len(self.running) / self.slots)

    def ended(self, tokens: int, seconds: float) -> None:
        """A stream of so many tokens took so long."""
        rate = tokens / seconds
        self.measured = rate if not self.measured else self.measured + _SMOOTHING * (rate - self.measured)

    def entry(self, now: float) -> DirectoryEntry:
        """What it tells of itself in a heartbeat."""
        self.sequence += 1
        node = Node(f"node-of-{self.name}", self.name, "linux", Cpu("cpu", 8, 16), 64 << 30, 32 << 30)
        runner = Runner(
            self.name, 1, node.node_id, "10.0.0.1:7201", f"{self.name}.runner.sim", "1", (_ENGINE,), (_STATUS,)
        )
        load = ModelLoad(ARTIFACT, len(self.running), self.slots, len(self.queue), tokens_per_second=self.measured)
        whose = Counter(coordinator_name(job.coordinator) for job in (*self.running, *self.queue))
        report = Load((load,), by_coordinator=whose)
        return DirectoryEntry(RunnerRecord(runner, node, RunnerState.READY, report, self.sequence), now)


@dataclass(frozen=True, slots=True)
class Fleet:
    """The machines, and what goes wrong: when, with which one (by index), what; None: it is well again."""

    machines: Sequence[Machine]
    troubles: Sequence[tuple[float, int, Trouble | None]] = ()

    @property
    def tokens_per_second(self) -> float:
        """What all of them decode at most where all their slots are taken."""
        return sum(machine.rate * machine.slots / (1.0 + _CROWDING) for machine in self.machines)


def make_fleet(count: int, rng: Random, troubles: Sequence[tuple[float, float, Trouble, float]] = ()) -> Fleet:
    """Machines from an old laptop to one with a large GPU: rates within a factor of 16, 2 to 32 slots.

    `troubles`: from when to when (seconds) which trouble befalls what share of them; nobody has two at a time, so the
    shares add up to 1 at most.
    """
    machines = []
    for number in range(count):
        kind = rng.choice(((20.0, 2), (40.0, 4), (80.0, 16), (120.0, 32)))
        machines.append(Machine(f"runner-{number:04}", kind[0] * rng.uniform(0.7, 1.4), kind[1]))
    indexes = rng.sample(range(count), count)
    events: list[tuple[float, int, Trouble | None]] = []
    for start, end, trouble, share in troubles:
        befallen, indexes = indexes[: round(share * count)], indexes[round(share * count) :]
        events += [(start, index, trouble) for index in befallen]
        events += [(end, index, None) for index in befallen]
    return Fleet(machines, sorted(events, key=lambda event: event[0]))
