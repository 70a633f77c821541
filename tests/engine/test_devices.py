"""Graphics devices as the engine sees them, with a machine that has some; and how steps take turns."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from chorus.core.errors import ConfigError, EngineError
from chorus.core.residency.devices import HOST, Use
from chorus.engine.llama import ResidencySettings, binding, ggml
from chorus.engine.llama.devices import DeviceReader, give_back_freed_memory
from chorus.engine.llama.turns import Turns

GIB = 1 << 30
DEVICES = (
    ggml.GpuDevice("CUDA0", 0x10, integrated=False),
    ggml.GpuDevice("CUDA1", 0x20, integrated=False),
    ggml.GpuDevice("CUDA2", 0x30, integrated=False),
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretends that there are three devices of 8 GiB, 6 free; collects which were asked for anything."""
    names: list[str] = []

    def memory_of(device: ggml.GpuDevice) -> tuple[int, int]:
        names.append(device.name)
        return 6 * GIB, 8 * GIB

    def bus_id(device: ggml.GpuDevice) -> str:
        names.append(device.name)
        return f"0000:c{device.name[-1]}:00.0"

    monkeypatch.setattr(ggml, "gpu_devices", lambda: DEVICES)
    monkeypatch.setattr(ggml, "memory_of", memory_of)
    monkeypatch.setattr(ggml, "bus_id", bus_id)
    return names


def test_each_device_has_its_use_and_a_reserved_one_is_left_alone(asked: list[str]) -> None:
    settings = ResidencySettings(reserve_bytes=GIB, gpu_uses={"CUDA1": "reserved", "CUDA2": "qwen3-8b"})
    machine = DeviceReader(settings, gpus=lambda: {"0000:c2:00.0": 2 * GIB})()
    first, third = machine.gpus
    assert (first.name, first.use, first.free_bytes, first.room(0)) == ("CUDA0", Use.DYNAMIC, 6 * GIB, 5 * GIB)
    assert (third.name, third.use, third.model) == ("CUDA2", Use.DEDICATED, "qwen3-8b")
    assert third.free_bytes == 2 * GIB, "the driver knows of foreign work that ggml does not see"
    assert set(asked) == {"CUDA0", "CUDA2"}


def test_without_offloading_no_device_is_asked(asked: list[str]) -> None:
    assert DeviceReader(ResidencySettings(), uses_gpus=False)().gpus == ()
    assert asked == []


@pytest.mark.parametrize(
    "settings", [ResidencySettings(gpu_uses={"CUDA7": "reserved"}), ResidencySettings(assignments={"m": ("CUDA7",)})]
)
def test_a_device_that_is_not_there_is_an_error_with_those_that_are(
    settings: ResidencySettings, asked: list[str]
) -> None:
    with pytest.raises(ConfigError, match="no graphics device CUDA7 here; there are: CUDA0, CUDA1, CUDA2"):
        DeviceReader(settings)


def test_an_integrated_device_has_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "gpu_devices", lambda: (ggml.GpuDevice("Vulkan0", 1, integrated=True),))
    monkeypatch.setattr(ggml, "memory_of", lambda _: (0, 0))
    monkeypatch.setattr(ggml, "bus_id", lambda _: "")
    machine = DeviceReader(ResidencySettings(reserve_bytes=GIB))()
    (gpu,) = machine.gpus
    assert gpu.shares_host
    assert gpu.free_bytes == machine.host.free_bytes


def test_the_hosts_memory_is_limited_by_what_limits_the_process() -> None:
    total = psutil.virtual_memory().total
    machine = DeviceReader(ResidencySettings(reserve_bytes=GIB))()
    assert machine.host.name == HOST
    assert machine.host.limit_bytes == max(total - GIB, 0)
    assert 0 <= machine.host.free_bytes < total
    contained = DeviceReader(ResidencySettings(reserve_bytes=GIB), host_limit=lambda: (3 * GIB, GIB // 2))()
    assert contained.host.limit_bytes == 2 * GIB
    assert contained.host.free_bytes <= GIB // 2
    capped = DeviceReader(ResidencySettings(limit_bytes=12345))()
    assert capped.host.limit_bytes == 12345


def test_this_machines_own_devices_can_be_read() -> None:
    give_back_freed_memory()
    for device in ggml.gpu_devices():
        free, total = ggml.memory_of(device)
        assert 0 <= free <= total
        assert isinstance(ggml.bus_id(device), str)


def test_an_offload_names_devices_and_shares(asked: list[str]) -> None:
    params: Any = binding.library().llama_model_default_params()
    offload = ggml.Offload([("CUDA2", 3), ("CUDA0", 8)])
    offload.fill(params)
    assert params.n_gpu_layers == 11
    handles = ctypes.cast(params.devices, ctypes.POINTER(ctypes.c_void_p))
    assert [handles[0], handles[1], handles[2]] == [0x30, 0x10, None]
    assert [params.tensor_split[place] for place in range(2)] == [3.0, 8.0]
    with pytest.raises(EngineError, match="no graphics device CUDA9"):
        ggml.Offload([("CUDA9", 1)])


def test_no_offload_is_a_list_without_devices() -> None:
    params = SimpleNamespace(devices=None, n_gpu_layers=-1, tensor_split="untouched")
    ggml.Offload().fill(params)
    assert params.n_gpu_layers == 0
    assert params.devices.value, "no list at all would mean every device"
    assert ctypes.cast(params.devices, ctypes.POINTER(ctypes.c_void_p))[0] is None
    assert params.tensor_split == "untouched"


def test_turns_are_taken_in_the_order_of_asking() -> None:
    turns, order = Turns(1), []
    threads = []

    def work(name: str) -> None:
        with turns.taken(name):
            order.append(name)

    with turns.taken("first"):
        for place, name in enumerate("abc", start=1):
            thread = threading.Thread(target=work, args=(name,))
            threads.append(thread)
            thread.start()
            while len(turns._waiting) < place:
                threading.Event().wait(0.001)
    for thread in threads:
        thread.join()
    assert order == ["a", "b", "c"]
    with turns.taken("first"):
        order.append("again")
    assert order[-1] == "again"


def test_without_a_limit_nobody_waits() -> None:
    turns = Turns(0)
    with turns.taken("one"), turns.taken("other"):
        assert not turns._waiting


def test_as_many_as_allowed_are_inside() -> None:
    turns = Turns(2)
    inside, most, lock = [0], [0], threading.Lock()

    def work(owner: int) -> None:
        for _ in range(200):
            with turns.taken(owner):
                with lock:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                with lock:
                    inside[0] -= 1

    threads = [threading.Thread(target=work, args=(owner,)) for owner in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] <= 2
    assert (inside[0], turns._inside) == (0, set())
