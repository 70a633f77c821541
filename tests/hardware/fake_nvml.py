"""A stand-in for the module pynvml, whose devices fail at whatever questions a test says."""
# ruff: noqa: N802 - the names are NVML's

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml


@dataclass
class FakeDevice:
    """A GPU; `failing` maps a function's name to the NVML error that it raises."""

    uuid: str = "GPU-0000"
    name: str | bytes = "NVIDIA GeForce RTX 3060"
    total: int = 12 << 30
    free: int = 11 << 30
    busy: int = 37
    temperature: int = 61
    reasons: int = 0
    bus_id: str | bytes = b"00000000:C1:00.0"
    failing: Mapping[str, type[pynvml.NVMLError]] = field(default_factory=dict)


class FakeNvml:
    """Answers for `devices`; `init_error` is raised by nvmlInit."""

    def __init__(
        self, *devices: FakeDevice, init_error: Exception | None = None, driver: str | bytes = "575.64"
    ) -> None:
        self.devices = devices
        self.init_error = init_error
        self.driver = driver
        self.shutdowns = 0

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise self.init_error

    def nvmlShutdown(self) -> None:
        self.shutdowns += 1

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        return self.driver

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return self._answer(self.devices[index], "nvmlDeviceGetHandleByIndex", self.devices[index])

    def nvmlDeviceGetUUID(self, handle: FakeDevice) -> str:
        return self._answer(handle, "nvmlDeviceGetUUID", handle.uuid)

    def nvmlDeviceGetName(self, handle: FakeDevice) -> str | bytes:
        return self._answer(handle, "nvmlDeviceGetName", handle.name)

    def nvmlDeviceGetMemoryInfo(self, handle: FakeDevice) -> Any:
        memory = SimpleNamespace(total=handle.total, free=handle.free, used=handle.total - handle.free)
        return self._answer(handle, "nvmlDeviceGetMemoryInfo", memory)

    def nvmlDeviceGetPciInfo(self, handle: FakeDevice) -> Any:
        return self._answer(handle, "nvmlDeviceGetPciInfo", SimpleNamespace(busId=handle.bus_id))

    def nvmlDeviceGetUtilizationRates(self, handle: FakeDevice) -> Any:
        return self._answer(handle, "nvmlDeviceGetUtilizationRates", SimpleNamespace(gpu=handle.busy, memory=5))

    def nvmlDeviceGetTemperature(self, handle: FakeDevice, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self._answer(handle, "nvmlDeviceGetTemperature", handle.temperature)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: FakeDevice) -> int:
        return self._answer(handle, "nvmlDeviceGetCurrentClocksEventReasons", handle.reasons)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: FakeDevice) -> int:
        return self._answer(handle, "nvmlDeviceGetCurrentClocksThrottleReasons", handle.reasons)

    @staticmethod
    def _answer(device: FakeDevice, function: str, answer: Any) -> Any:
        error = device.failing.get(function)
        if error is not None:
            raise error()
        return answer
