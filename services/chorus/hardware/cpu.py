"""The processor: its name, its cores, and the instruction sets that llama.cpp makes use of."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil

from chorus.core.fleet.records import Cpu

CPUINFO = Path("/proc/cpuinfo")
_X86_FEATURES = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "amx_int8", "amx_bf16",
)  # fmt: skip
_ARM_FEATURES = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme")


def read_cpu(cpuinfo: Path = CPUINFO) -> Cpu:
    """Returns what is known of the processor. Where the system tells nothing, the name is its architecture."""
    fields = _cpuinfo(cpuinfo)
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    logical = psutil.cpu_count(logical=True) or 1
    return Cpu(
        model=fields.get("model name") or platform.processor() or platform.machine() or "unknown",
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        features=tuple(name for name in (*_X86_FEATURES, *_ARM_FEATURES) if name in flags),
    )


def _cpuinfo(path: Path) -> dict[str, str]:
    """The first processor's lines; all of a machine's are alike in what is read here."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return fields
