"""The memory that models of this engine may use, as it is now."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Mapping

import psutil

from chorus.core.residency.devices import HOST, Device, Machine, Use
from chorus.engine.llama import ggml
from chorus.engine.llama.settings import ResidencySettings

HostLimit = Callable[[], tuple[int, int] | None]
"""What this process may use of the host's memory, and what of that is free, in bytes; None where nothing limits it."""

GpuMemory = Callable[[], Mapping[str, int]]
"""Free bytes of graphics devices by where they are on the PCI bus (`0000:c1:00.0`), as the driver knows them."""


class DeviceReader:
    """Reads the machine's memory. Called in one thread at a time; never raises.

    Devices that are reserved for foreign work are not touched at all, since the very question would take memory there.
    """

    def __init__(
        self,
        settings: ResidencySettings,
        *,
        host_limit: HostLimit = lambda: None,
        gpus: GpuMemory = dict,
        uses_gpus: bool = True,
    ) -> None:
        """Raises `ConfigError` where the settings name a graphics device that isn't there."""
        self._settings = settings
        self._host_limit = host_limit
        self._gpus = gpus
        named = {*settings.gpu_uses, *(device for devices in settings.assignments.values() for device in devices)}
        ggml.check_names(sorted(named))
        self._devices = tuple(gpu for gpu in ggml.gpu_devices() if self._use(gpu.name) is not Use.RESERVED)
        if not uses_gpus:
            self._devices = ()
        self._bus_ids: dict[str, str] = {}
        self._process = psutil.Process()

    def __call__(self) -> Machine:
        """What there is now."""
        host = self._read_host()
        return Machine(host, tuple(self._read_gpu(device, host) for device in self._devices))

    def _read_host(self) -> Device:
        memory = psutil.virtual_memory()
        # A file that is mapped into this process counts as available, since the system could drop it: weights in use.
        mapped = getattr(self._process.memory_info(), "shared", 0)
        total, free = int(memory.total), max(int(memory.available) - int(mapped), 0)
        limit = self._host_limit()
        if limit is not None:
            total, free = min(total, limit[0]), min(free, limit[1])
        reserve, most = self._settings.reserve_bytes, self._settings.limit_bytes
        allowed = max(total - reserve, 0)
        return Device(HOST, free, allowed if most is None else min(allowed, most), reserve)

    def _read_gpu(self, device: ggml.GpuDevice, host: Device) -> Device:
        free, total = ggml.memory_of(device)
        if device.integrated and not total:  # it tells nothing, and has what the host has
            free, total = host.free_bytes, host.limit_bytes + host.reserve_bytes
        if device.name not in self._bus_ids:
            self._bus_ids[device.name] = ggml.bus_id(device)
        told = self._gpus().get(self._bus_ids[device.name]) if self._bus_ids[device.name] else None
        reserve = self._settings.reserve_bytes
        use = self._use(device.name)
        return Device(
            name=device.name,
            # Some drivers tell ggml of no foreign work (Vulkan without its budget extension), NVIDIA's own tool does.
            free_bytes=free if told is None else min(free, told),
            limit_bytes=max(total - reserve, 0),
            reserve_bytes=reserve,
            use=use,
            model=self._settings.gpu_uses.get(device.name, "") if use is Use.DEDICATED else "",
            shares_host=device.integrated,
        )

    def _use(self, device: str) -> Use:
        said = self._settings.gpu_uses.get(device, Use.DYNAMIC)
        return Use(said) if said in (Use.DYNAMIC, Use.RESERVED) else Use.DEDICATED


def give_back_freed_memory() -> None:
    """Gives memory that C has freed back to the system, which glibc else keeps for its own next use."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library, which has no such function
            ctypes.CDLL(None).malloc_trim(0)
