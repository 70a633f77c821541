"""This machine as a core Node, and its load now."""

from __future__ import annotations

import dataclasses
import platform
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

from chorus.core.fleet.records import Cpu, Gpu, Node
from chorus.hardware.cgroup import MemoryLimit, memory_limit
from chorus.hardware.cpu import read_cpu
from chorus.hardware.nvml import NvmlGpus


@dataclass(frozen=True, slots=True)
class GpuSupport:
    """Whether the engine of this machine can use a GPU, and the fix where it can't.

    The caller knows the engine; this package doesn't import it. For llama.cpp pass
    `llama_supports_gpu_offload()` and the command that builds it for the GPU.
    """

    usable: bool
    fix: str = ""


@dataclass(frozen=True, slots=True)
class HardwareLoad:
    """How busy the machine is: `cpu_utilization` is 0..1 over all cores since the last sample."""

    cpu_utilization: float
    memory_total_bytes: int
    memory_available_bytes: int
    gpus: tuple[Gpu, ...]


class Inventory:
    """Reads this machine. Safe to use from several threads; `close` lets go of the GPU driver.

    What can't change is read once, so that `sample_load` takes well under a millisecond without GPUs.
    """

    def __init__(
        self,
        node_id: str,
        *,
        gpu_support: GpuSupport | None = None,
        labels: Mapping[str, str] | None = None,
        gpus: NvmlGpus | None = None,
        limit: Callable[[], MemoryLimit | None] = memory_limit,
    ) -> None:
        """`gpu_support` None says nothing of the engine, and leaves GPUs usable."""
        self._node_id = node_id
        self._support = gpu_support
        self._labels = dict(labels or {})
        self._gpus = NvmlGpus() if gpus is None else gpus
        self._limit = limit
        self._cpu: Cpu = read_cpu()
        self._lock = threading.Lock()
        self._last_times = _cpu_times()

    def __enter__(self) -> Inventory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the GPU driver. May be called twice."""
        self._gpus.close()

    @property
    def gpu_problem(self) -> str:
        """Why a GPU that seems to be there can't be seen; empty where nothing is wrong."""
        return self._gpus.problem

    def node(self) -> Node:
        """Returns the machine as it is now."""
        total, available = self._memory()
        return Node(
            node_id=self._node_id,
            hostname=socket.gethostname(),
            os=f"{platform.system()} {platform.machine()}",
            cpu=self._cpu,
            memory_total_bytes=total,
            memory_available_bytes=available,
            gpus=self._read_gpus(),
            labels=dict(self._labels),
        )

    def sample_load(self) -> HardwareLoad:
        """Returns how busy the machine is. The first sample counts from when the inventory was made."""
        now = _cpu_times()
        with self._lock:
            busy, whole = now[0] - self._last_times[0], now[1] - self._last_times[1]
            if whole > 0:
                self._last_times = now
        total, available = self._memory()
        return HardwareLoad(
            cpu_utilization=min(max(busy / whole, 0.0), 1.0) if whole > 0 else 0.0,
            memory_total_bytes=total,
            memory_available_bytes=available,
            gpus=self._read_gpus(),
        )

    def _memory(self) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        total, available = int(memory.total), int(memory.available)
        limit = self._limit()
        if limit is not None and limit.limit_bytes < total:
            return limit.limit_bytes, min(available, limit.free_bytes)
        return total, available

    def _read_gpus(self) -> tuple[Gpu, ...]:
        gpus = self._gpus.read()
        if self._support is None or self._support.usable:
            return gpus
        return tuple(dataclasses.replace(gpu, usable=False, problem=self._support.fix or gpu.problem) for gpu in gpus)


def _cpu_times() -> tuple[float, float]:
    """Seconds that all cores were busy, and seconds in all."""
    times = psutil.cpu_times()
    # Time as a guest counts as user time already; time waiting for a disk is idle time.
    whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    idle = times.idle + getattr(times, "iowait", 0.0)
    return whole - idle, whole
