"""NVIDIA devices through NVML, the driver's own library. A machine without the driver has none, which is no error."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import pynvml

from chorus.core.fleet.records import Gpu

T = TypeVar("T")

_SLOWED_DOWN = (
    pynvml.nvmlClocksEventReasonSwPowerCap
    | pynvml.nvmlClocksEventReasonHwSlowdown
    | pynvml.nvmlClocksEventReasonSwThermalSlowdown
    | pynvml.nvmlClocksEventReasonHwThermalSlowdown
    | pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
)


class Nvml(Protocol):
    """The part of the module `pynvml` that is used. Every function may raise `pynvml.NVMLError`."""

    def nvmlInit(self) -> None: ...  # noqa: N802 - NVML's own names
    def nvmlShutdown(self) -> None: ...  # noqa: N802
    def nvmlSystemGetDriverVersion(self) -> str | bytes: ...  # noqa: N802
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: N802
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any: ...  # noqa: N802
    def nvmlDeviceGetUUID(self, handle: Any, /) -> str | bytes: ...  # noqa: N802
    def nvmlDeviceGetName(self, handle: Any, /) -> str | bytes: ...  # noqa: N802
    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any: ...  # noqa: N802
    def nvmlDeviceGetPciInfo(self, handle: Any, /) -> Any: ...  # noqa: N802
    def nvmlDeviceGetUtilizationRates(self, handle: Any, /) -> Any: ...  # noqa: N802
    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int, /) -> int: ...  # noqa: N802
    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any, /) -> int: ...  # noqa: N802
    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, /) -> int: ...  # noqa: N802


@dataclass(frozen=True, slots=True)
class _Device:
    """What of a device never changes."""

    index: int
    handle: Any
    uuid: str
    name: str
    bus_id: str  # such as `0000:c1:00.0`; empty where it isn't told


class NvmlGpus:
    """The NVIDIA devices of this machine, found once and read as often as wanted. Safe to use from several threads.

    `problem` says why there are none where a driver seems to be installed but does not work; it is empty otherwise.
    """

    def __init__(self, nvml: Nvml | None = None) -> None:
        self._nvml: Nvml = cast(Nvml, pynvml) if nvml is None else nvml
        self._lock = threading.Lock()
        self._devices: tuple[_Device, ...] = ()
        self._driver = ""
        self._open = False
        self.problem = ""
        try:
            self._nvml.nvmlInit()
        except pynvml.NVMLError as error:
            if not isinstance(error, pynvml.NVMLError_LibraryNotFound | pynvml.NVMLError_DriverNotLoaded):
                self.problem = f"NVIDIA's driver does not answer: {error}; reinstall it or restart this machine"
            return
        except OSError as error:  # a library that is there but can't be loaded
            self.problem = f"NVIDIA's driver library can't be loaded: {error}; reinstall the driver"
            return
        self._open = True
        self._driver = _text(self._ask(self._nvml.nvmlSystemGetDriverVersion) or "")
        self._devices = self._find()

    def close(self) -> None:
        """Lets go of the driver. May be called twice."""
        with self._lock:
            if self._open:
                self._open = False
                self._devices = ()
                with contextlib.suppress(pynvml.NVMLError):
                    self._nvml.nvmlShutdown()

    def read(self) -> tuple[Gpu, ...]:
        """Returns every device as it is now. What a device doesn't tell is None, or 0 for its memory."""
        with self._lock:
            return tuple(self._read(device) for device in self._devices)

    def free_by_bus(self) -> dict[str, int]:
        """Free bytes of every device that tells, by its place on the PCI bus, such as `0000:c1:00.0`."""
        with self._lock:
            memories = {
                device.bus_id: self._ask(self._nvml.nvmlDeviceGetMemoryInfo, device.handle)
                for device in self._devices
                if device.bus_id
            }
        return {bus_id: int(memory.free) for bus_id, memory in memories.items() if memory is not None}

    def _find(self) -> tuple[_Device, ...]:
        devices = []
        for index in range(self._ask(self._nvml.nvmlDeviceGetCount) or 0):
            handle = self._ask(self._nvml.nvmlDeviceGetHandleByIndex, index)
            if handle is None:
                self.problem = f"GPU {index} can't be opened (permissions, or a broken device)"
                continue
            uuid = self._ask(self._nvml.nvmlDeviceGetUUID, handle)
            name = self._ask(self._nvml.nvmlDeviceGetName, handle)
            place = self._ask(self._nvml.nvmlDeviceGetPciInfo, handle)
            bus_id = "" if place is None else _bus_id(_text(place.busId))
            devices.append(_Device(index, handle, _text(uuid or ""), _text(name or "NVIDIA GPU"), bus_id))
        return tuple(devices)

    def _read(self, device: _Device) -> Gpu:
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, device.handle)
        rates = self._ask(self._nvml.nvmlDeviceGetUtilizationRates, device.handle)
        reasons = self._ask(self._nvml.nvmlDeviceGetCurrentClocksEventReasons, device.handle)
        if reasons is None:  # the older name of the same question, for drivers before 535
            reasons = self._ask(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons, device.handle)
        temperature = self._ask(self._nvml.nvmlDeviceGetTemperature, device.handle, pynvml.NVML_TEMPERATURE_GPU)
        return Gpu(
            index=device.index,
            uuid=device.uuid,
            name=device.name,
            memory_total_bytes=0 if memory is None else int(memory.total),
            memory_free_bytes=0 if memory is None else int(memory.free),
            driver_version=self._driver,
            utilization=None if rates is None else min(max(rates.gpu / 100, 0.0), 1.0),
            temperature_celsius=None if temperature is None else float(temperature),
            throttled=None if reasons is None else bool(reasons & _SLOWED_DOWN),
            problem="" if memory is not None else "it does not tell how much memory it has",
        )

    def _ask(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """Many devices support only some questions, and each may stop answering; either way the answer is None."""
        try:
            return function(*arguments)
        except pynvml.NVMLError:
            return None


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _bus_id(told: str) -> str:
    """NVML's `00000000:C1:00.0` as everybody else writes it: a domain of four digits, in lower case."""
    domain, colon, rest = told.strip("\0").partition(":")
    return f"{domain[-4:]}{colon}{rest}".lower()
