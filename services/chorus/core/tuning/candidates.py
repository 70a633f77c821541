"""What is worth trying on a machine for a file."""

from __future__ import annotations

from collections.abc import Collection

from chorus.core.fitting.memory import CacheType
from chorus.core.tuning.search import Axis, Space
from chorus.core.tuning.variant import Variant

_THREAD_SHARES = (0.25, 0.5, 0.75, 1.0)
_BATCHES = ((512, 128), (512, 256), (512, 512), (1024, 1024))
_CACHE_TYPES = (CacheType.Q8_0, CacheType.Q4_0)

BITS_PER_WEIGHT = {
    "F32": 32.0,
    "F16": 16.0,
    "BF16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.56,
    "Q5_1": 6.0,
    "Q5_K_M": 5.69,
    "Q5_K_S": 5.54,
    "Q5_0": 5.5,
    "Q4_1": 5.0,
    "Q4_K_M": 4.89,
    "Q4_K_S": 4.6,
    "Q4_0": 4.55,
}
"""The average of a whole file. A quantization that isn't here has fewer: those below four bits and their like."""


def space_for(
    base: Variant,
    *,
    physical_cores: int,
    usable_threads: int,
    quantization: str,
    parameter_count: int,
    memory_bytes: int,
    axes: Collection[Axis] = tuple(Axis),
) -> Space:
    """What to choose from for a file in `quantization`, where `usable_threads` may run and `memory_bytes` are free."""
    threads = {max(1, round(share * physical_cores)) for share in _THREAD_SHARES} | {usable_threads}
    return Space(
        base=base,
        threads=tuple(sorted(count for count in threads if count <= usable_threads)) if Axis.THREADS in axes else (),
        batches=_BATCHES if Axis.BATCH in axes else (),
        cache_types=_CACHE_TYPES if Axis.CACHE in axes else (),
        quantizations=tuple(
            name for name in _requantizations(quantization) if file_bytes(name, parameter_count) <= memory_bytes
        )
        if Axis.QUANTIZATION in axes
        else (),
        memory_bytes=memory_bytes,
    )


def file_bytes(quantization: str, parameter_count: int) -> int:
    """About how large a file of that quantization is. Raises KeyError for one that isn't in `BITS_PER_WEIGHT`."""
    return int(parameter_count * BITS_PER_WEIGHT[quantization] / 8)


def _requantizations(source: str) -> tuple[str, ...]:
    """What a file may be requantized to.

    Eight bits keep what any quantization left and are quick to compute with; four bits in llama.cpp's oldest layout are
    the quickest. What lies between is for files that still have eight bits or more: from less, it can only lose.
    """
    bits = BITS_PER_WEIGHT.get(source, 0.0)
    wanted = ["Q8_0"]
    if bits >= BITS_PER_WEIGHT["Q8_0"]:
        wanted += ["Q6_K", "Q4_K_M"]
    if bits > BITS_PER_WEIGHT["Q4_0"]:
        wanted.append("Q4_0")
    return tuple(name for name in wanted if name != source)
