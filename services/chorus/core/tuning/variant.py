"""One way to run a model, and what was measured of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from chorus.core.fitting.memory import CacheType
from chorus.core.fleet.records import Cpu
from chorus.core.tuning.figures import Figure, Quality, summarize

# What a speed is made of, and how much each part counts: answers are what people wait for, alone or together.
_WEIGHTS = (("decode_one", 0.4), ("decode_many", 0.4), ("prefill", 0.2))


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a model. `quantization` is empty for the file as it is; otherwise it is requantized to that.

    A batch of at most `batch_tokens` is decoded in pieces of `micro_batch_tokens`, which decide the size of buffers.
    """

    threads: int
    batch_tokens: int = 512
    micro_batch_tokens: int = 512
    cache_type: CacheType = CacheType.F16
    quantization: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of a variant: tokens per second of reading a prompt, of one stream, and of all streams together.

    `memory_bytes` is what llama.cpp allocated for weights, KV memory and compute buffers.
    """

    prefill: float
    decode_one: float
    decode_many: float
    memory_bytes: int

    @property
    def speed(self) -> float:
        """The one figure that variants are compared by: the weighted geometric mean of the three, in tokens/s."""
        product = 1.0
        for name, weight in _WEIGHTS:
            product *= max(float(getattr(self, name)), 1e-9) ** weight
        return product


@dataclass(slots=True)
class Record:
    """All that was found out about one variant. `problem` says why it can't be run, where that is so."""

    variant: Variant
    samples: list[Sample] = field(default_factory=list)
    quality: Quality | None = None
    problem: str = ""
    gain: Figure | None = None  # speed over that of the variant it was compared with, measured in turns

    @property
    def speed(self) -> Figure:
        """The speed that `Sample.speed` defines. Raises ValueError where nothing was measured."""
        return summarize([sample.speed for sample in self.samples])

    def figure(self, name: str) -> Figure:
        """One of a sample's three figures. Raises ValueError where nothing was measured."""
        return summarize([float(getattr(sample, name)) for sample in self.samples])

    @property
    def memory_bytes(self) -> int:
        """The most that it took; 0 where nothing was measured."""
        return max((sample.memory_bytes for sample in self.samples), default=0)


def machine_identity(cpu: Cpu, usable_threads: int, devices: Sequence[str] = ()) -> str:
    """A short name of what decides speed on a machine: 16 hex digits, the same for machines that are alike."""
    facts = (
        cpu.model,
        str(cpu.physical_cores),
        str(cpu.logical_cores),
        str(usable_threads),
        *sorted(cpu.features),
        "|",
        *devices,
    )
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
