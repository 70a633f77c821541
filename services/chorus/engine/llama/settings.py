"""What the llama.cpp engine is told: which files it has, and how it may use the machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import psutil

from chorus.core.errors import ConfigError
from chorus.core.fitting.memory import CacheType, ModelShape
from chorus.core.fleet.records import Artifact
from chorus.core.resilience.stuck import Patience
from chorus.engine.llama.context import MAX_SEQUENCES


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A LoRA adapter's file. `name` is what requests call it; `stamp` differs once the file is another one.

    `check` is called right before llama.cpp reads the file, in the loader's thread, and raises `ModelFileError` unless
    it is sound and fits the model: llama.cpp ends the process over much that can be wrong with one.
    """

    name: str
    path: Path
    size_bytes: int
    stamp: Hashable
    check: Callable[[], object] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was found to be best for one model on this machine. None leaves the engine's setting as it is."""

    threads: int | None = None
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    cache_type: CacheType | None = None


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model file, checked already by whoever found it.

    `chat_template` overrides the file's own. `shape` tells what it needs of memory; without one that is guessed from
    its size. `adapters` may be named by requests. `draft` is a small model with the same vocabulary that guesses tokens
    ahead for this one; it is loaded, and its memory counted, with this one.
    """

    artifact: Artifact
    path: Path
    chat_template: str | None = None
    shape: ModelShape | None = None
    adapters: tuple[AdapterSource, ...] = ()
    draft: ModelSource | None = None
    tuned: Tuned | None = None


@dataclass(frozen=True, slots=True)
class ResidencySettings:
    """How the models share the machine's memory.

    `reserve_bytes` stay free on every device; all models together take at most `limit_bytes` of the host's memory. Of
    `max_loaded` and `max_decoding` models 0 is no limit; the latter counts those that compute a step at one time.
    `keep_alive_s` is how long an idle model stays, 0 for ever. `pinned` ones are never evicted. Models are named by
    artifact or family, graphics devices as llama.cpp does, such as CUDA0. `gpu_uses` says of a device `dynamic` (so
    are all that it doesn't name), `reserved`, or the one model that may use it; `assignments` which devices a model
    may use. `longest_hold_s` is how long a model is kept at most from one that waits for its memory.
    """

    reserve_bytes: int = 1 << 30
    limit_bytes: int | None = None
    max_loaded: int = 0
    max_decoding: int = 0
    keep_alive_s: float = 0.0
    pinned: frozenset[str] = frozenset()
    gpu_uses: Mapping[str, str] = field(default_factory=dict)
    assignments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    longest_hold_s: float = 5.0


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """How each model is run.

    `slots` streams decode at a time and `max_queue` requests wait. A single request may use `context_length` tokens,
    prompt and answer together (the model's own limit where that is less); `kv_tokens` is what all of them may use
    together, by default all slots in full. While streams run, at most `prefill_tokens` of other prompts are read in a
    step, which is to take about `gap_s` seconds. `prefix_cache`: finished sequences stay in memory, at most
    `cached_sequences` of them, as long as they are worth it. `speculation`: tokens are guessed ahead where that pays.
    `threads` None: one a physical core that this process may use. `gpu_layers` -1: all that fit.
    `patience`: how long a step may take before the engine is held to be stuck.
    A batch of `batch_tokens` is computed in pieces of `micro_batch_tokens`, None being as many. `cache_type` other than
    floats needs `flash_attention`.
    """

    slots: int = 4
    context_length: int = 4096
    kv_tokens: int | None = None
    max_queue: int = 64
    threads: int | None = None
    gpu_layers: int = -1
    batch_tokens: int = 512
    micro_batch_tokens: int | None = None
    cache_type: CacheType = CacheType.F16
    prefill_tokens: int = 512
    gap_s: float = 0.18
    prefix_cache: bool = True
    cached_sequences: int = 16
    speculation: bool = True
    flash_attention: bool = True
    lock_memory: bool = False
    adapters_kept: int = 8
    patience: Patience = field(default_factory=Patience)
    residency: ResidencySettings = ResidencySettings()

    def __post_init__(self) -> None:
        """Raises `ConfigError` for what llama.cpp cannot do."""
        wrong = {
            "slots": not 1 <= self.slots <= MAX_SEQUENCES,
            "context_length": self.context_length < 8,
            "kv_tokens": self.kv_tokens is not None and self.kv_tokens < 8,
            "max_queue": self.max_queue < 0,
            "threads": self.threads is not None and self.threads < 1,
            "batch_tokens": self.batch_tokens < self.slots,
            "adapters_kept": self.adapters_kept < 1,
            "micro_batch_tokens": self.micro_batch_tokens is not None and self.micro_batch_tokens < 1,
            "prefill_tokens": self.prefill_tokens < 1,
            "gap_s": not self.gap_s > 0,
            "cached_sequences": not 0 <= self.cached_sequences <= MAX_SEQUENCES,
            "cache_type": self.cache_type.quantized and not self.flash_attention,
        }
        for key, is_wrong in wrong.items():
            if is_wrong:
                raise ConfigError(f"engine setting {key} cannot be {getattr(self, key)}", metadata={"key": key})

    @property
    def kept_sequences(self) -> int:
        """How many finished sequences may stay in memory."""
        return min(self.cached_sequences, MAX_SEQUENCES - self.slots) if self.prefix_cache else 0

    def tuned(self, tuned: Tuned | None) -> LlamaSettings:
        """These settings with what was found to be best for one model."""
        if tuned is None:
            return self
        batch = max(tuned.batch_tokens or self.batch_tokens, self.slots)
        return replace(
            self,
            threads=tuned.threads or self.threads,
            batch_tokens=batch,
            micro_batch_tokens=tuned.micro_batch_tokens or self.micro_batch_tokens,
            cache_type=tuned.cache_type or self.cache_type,
        )

    def thread_count(self) -> int:
        """Threads to decode with."""
        if self.threads is not None:
            return self.threads
        allowed = usable_threads()
        return max(1, min(allowed, _physical_cores() or allowed))


@cache
def _physical_cores() -> int | None:
    """Those of the machine. psutil reads some twenty files for it, which each request would have to wait for."""
    return psutil.cpu_count(logical=False)


def usable_threads() -> int:
    """The logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
