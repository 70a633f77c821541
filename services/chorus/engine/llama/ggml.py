"""The graphics devices that llama.cpp's compute library, ggml, sees, and their memory."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chorus.core.errors import ConfigError, EngineError
from chorus.engine.llama import binding

_GPU, _INTEGRATED = 1, 2  # ggml's own numbers of kinds; 0 is the processor, 3 what helps it


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """A graphics device by ggml's name, such as `CUDA0`. `handle` is the C pointer, which lives as long as the process.

    `integrated` ones use the host's memory.
    """

    name: str
    handle: int
    integrated: bool


class _Props(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", ctypes.c_bool * 64),  # more than there are: C writes what it knows
    ]


@functools.cache
def _library() -> Any:
    binding.library()
    ggml = importlib.import_module("llama_cpp._ggml").libggml
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_count.argtypes = []
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    ggml.ggml_backend_dev_name.restype = ctypes.c_char_p
    ggml.ggml_backend_dev_name.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_dev_type.restype = ctypes.c_int
    ggml.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    size = ctypes.POINTER(ctypes.c_size_t)
    ggml.ggml_backend_dev_memory.restype = None
    ggml.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size, size]
    ggml.ggml_backend_dev_get_props.restype = None
    ggml.ggml_backend_dev_get_props.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Props)]
    return ggml


@functools.cache
def gpu_devices() -> tuple[GpuDevice, ...]:
    """The graphics devices of this machine, in ggml's order; integrated ones only where there are no others.

    Asks none of them for anything, so that one which is reserved for foreign work holds nothing of this process.
    """
    ggml = _library()
    handles = [ggml.ggml_backend_dev_get(place) for place in range(ggml.ggml_backend_dev_count())]
    found = [
        GpuDevice(ggml.ggml_backend_dev_name(handle).decode("ascii", "replace"), handle, kind == _INTEGRATED)
        for handle in handles
        if (kind := ggml.ggml_backend_dev_type(handle)) in (_GPU, _INTEGRATED)
    ]
    own = tuple(device for device in found if not device.integrated)
    return own or tuple(found)


def memory_of(device: GpuDevice) -> tuple[int, int]:
    """Free and total bytes of a device now, whoever uses it. CUDA makes a context on the device for this answer."""
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    _library().ggml_backend_dev_memory(device.handle, ctypes.byref(free), ctypes.byref(total))
    return int(free.value), int(total.value)


def bus_id(device: GpuDevice) -> str:
    """Where on the PCI bus a device is, such as `0000:c1:00.0`; empty where its driver does not tell."""
    props = _Props()
    _library().ggml_backend_dev_get_props(device.handle, ctypes.byref(props))
    return props.device_id.decode("ascii", "replace").lower() if props.device_id else ""


class Offload:
    """Where llama.cpp is to put a model's last layers: so many on each device, in order. With none, nowhere.

    Holds the memory that the C structure points into, so it must live as long as the model.
    """

    def __init__(self, shares: Sequence[tuple[str, int]] = ()) -> None:
        """`shares` are names of devices and numbers of layers. Raises `EngineError` for one that isn't there."""
        known = {device.name: device.handle for device in gpu_devices()} if shares else {}
        missing = [name for name, _ in shares if name not in known]
        if missing:
            raise EngineError(f"there is no graphics device {missing[0]}")
        self.layers = sum(layers for _, layers in shares)
        # A list that is empty, but there, keeps llama.cpp from taking every device that it sees.
        self.devices = (ctypes.c_void_p * (len(shares) + 1))(*(known[name] for name, _ in shares), None)
        places = max(int(binding.library().llama_max_devices()), len(shares))
        self.split = (ctypes.c_float * places)(*(float(layers) for _, layers in shares))
        self._anywhere = False

    @classmethod
    def anywhere(cls, layers: int) -> Offload:
        """So many layers, or all with -1, divided over all devices as llama.cpp likes: for a process with one model."""
        offload = cls()
        offload.layers, offload._anywhere = layers, layers != 0
        return offload

    def fill(self, params: Any) -> None:
        """Sets what concerns devices in `llama_model_params`."""
        if self._anywhere:
            params.n_gpu_layers = self.layers
            return
        params.devices = ctypes.cast(self.devices, ctypes.c_void_p)
        params.n_gpu_layers = self.layers
        if self.layers:
            params.tensor_split = ctypes.cast(self.split, ctypes.POINTER(ctypes.c_float))


def check_names(names: Sequence[str]) -> None:
    """Raises `ConfigError`, naming those there are, for a graphics device that isn't there."""
    known = [device.name for device in gpu_devices()]
    for name in names:
        if name not in known:
            there = ", ".join(known) or "none, or this build of llama.cpp can use none"
            raise ConfigError(f"there is no graphics device {name} here; there are: {there}")
