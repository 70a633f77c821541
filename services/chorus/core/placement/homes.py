"""Where a model goes that has to be loaded: the same runner for every coordinator that sees the same mesh.

Chance spreads requests over runners that are equally good, but must not spread loads: two requests for a model that is
nowhere would load it twice. So this choice has none. A runner that is loading it already is waited for; else it goes
where it fits best, and of several that are as good, to the one that rendezvous hashing gives (D. G. Thaler and C. V.
Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", 1998): each model has an order of its own of all
runners, so that models are spread, and hardly any moves when a runner comes or goes.
"""

from __future__ import annotations

import hashlib
from math import floor, log2

from chorus.core.fleet.directory import DirectoryEntry
from chorus.core.fleet.records import EngineInfo, EngineKind, ModelState, ModelStatus, RunnerRecord
from chorus.core.placement.cost import engine_of, guessed_rate, is_on_gpu
from chorus.core.placement.fit import Situation

# What a model takes beside its file: KV memory and buffers.
_ROOM = 1.2


def is_cold(status: ModelStatus) -> bool:
    """Whether a request would have to wait until the model is loaded there."""
    return status.state is not ModelState.LOADED


def home_key(entry: DirectoryEntry, status: ModelStatus, situation: Situation) -> tuple[object, ...]:
    """How well a model would be placed there; the greatest of several is its home, and no two are equal.

    Most of all whether it is loading there; then no failures lately, no paid provider, whether it fits the free memory
    of a GPU, or the machine's, without anything else making room, and how fast that machine would be, roughly: a factor
    of two makes a difference.
    """
    record = entry.record
    engine = engine_of(record, status)
    runner_id = record.runner.runner_id
    return (
        status.state is ModelState.LOADING,
        runner_id not in situation.penalties,
        engine is None or engine.kind is not EngineKind.EXTERNAL,
        room(record, status, engine),
        floor(log2(guessed_rate(record, status, engine) * situation.weights.get(runner_id, 1.0))),
        hashlib.blake2b(f"{status.artifact.family}\0{runner_id}".encode(), digest_size=8).digest(),
    )


def room(record: RunnerRecord, status: ModelStatus, engine: EngineInfo | None) -> int:
    """How well a model fits beside those in memory: 2 on a GPU, 1 in memory, 0 where others would have to go first.

    A server's memory is its own affair.
    """
    if engine is None or engine.kind is not EngineKind.LOCAL:
        return 1
    needed = _ROOM * status.artifact.size_bytes
    gpus = record.load.gpus or record.node.gpus
    if is_on_gpu(engine) and any(gpu.usable and gpu.memory_free_bytes >= needed for gpu in gpus):
        return 2
    available = record.load.memory_available_bytes or record.node.memory_available_bytes
    return 1 if available >= needed else 0
