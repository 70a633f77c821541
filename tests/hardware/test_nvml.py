"""NVIDIA devices: none, whole, half-answering, broken."""

from __future__ import annotations

import pynvml
import pytest

from chorus.hardware import GpuSupport, Inventory, NvmlGpus
from tests.hardware.fake_nvml import FakeDevice, FakeNvml


def test_a_machine_without_the_driver_has_no_gpus_and_no_problem() -> None:
    for error in (pynvml.NVMLError_LibraryNotFound(), pynvml.NVMLError_DriverNotLoaded()):
        gpus = NvmlGpus(FakeNvml(init_error=error))
        assert gpus.read() == ()
        assert gpus.problem == ""


def test_this_machine_can_be_asked_whatever_it_is() -> None:
    gpus = NvmlGpus()
    for gpu in gpus.read():
        assert gpu.name
        assert gpu.memory_free_bytes <= gpu.memory_total_bytes
    gpus.close()
    gpus.close()
    assert gpus.read() == ()


@pytest.mark.parametrize(
    "error", [pynvml.NVMLError_LibRmVersionMismatch(), pynvml.NVMLError_Unknown(), OSError("wrong ELF class")]
)
def test_a_driver_that_does_not_work_is_no_error_but_is_told(error: Exception) -> None:
    gpus = NvmlGpus(FakeNvml(init_error=error))
    assert gpus.read() == ()
    assert "driver" in gpus.problem


def test_a_device_is_told_whole() -> None:
    nvml = FakeNvml(
        FakeDevice(),
        FakeDevice(uuid="GPU-1", name=b"Tesla P40", reasons=pynvml.nvmlClocksEventReasonSwThermalSlowdown, busy=100),
        driver=b"550.1",
    )
    gpus = NvmlGpus(nvml)
    first, second = gpus.read()
    assert (first.index, first.uuid, first.name) == (0, "GPU-0000", "NVIDIA GeForce RTX 3060")
    assert (first.memory_total_bytes, first.memory_free_bytes) == (12 << 30, 11 << 30)
    assert first.driver_version == "550.1"
    assert first.utilization == pytest.approx(0.37)
    assert first.temperature_celsius == 61.0
    assert first.throttled is False
    assert first.usable
    assert not first.problem
    assert (second.index, second.name, second.throttled, second.utilization) == (1, "Tesla P40", True, 1.0)
    gpus.close()
    assert nvml.shutdowns == 1


def test_an_idle_gpu_is_not_throttled() -> None:
    (gpu,) = NvmlGpus(FakeNvml(FakeDevice(reasons=pynvml.nvmlClocksEventReasonGpuIdle))).read()
    assert gpu.throttled is False


QUESTIONS = {
    "nvmlDeviceGetUtilizationRates": "utilization",
    "nvmlDeviceGetTemperature": "temperature_celsius",
}


@pytest.mark.parametrize(("function", "field"), QUESTIONS.items())
def test_what_a_device_does_not_tell_is_none(function: str, field: str) -> None:
    (gpu,) = NvmlGpus(FakeNvml(FakeDevice(failing={function: pynvml.NVMLError_NotSupported}))).read()
    assert getattr(gpu, field) is None
    others = set(QUESTIONS.values()) - {field}
    assert all(getattr(gpu, other) is not None for other in others)
    assert gpu.memory_total_bytes == 12 << 30


def test_an_old_driver_is_asked_by_the_old_name() -> None:
    new, old = "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
    reasons = pynvml.nvmlClocksEventReasonHwSlowdown
    (gpu,) = NvmlGpus(FakeNvml(FakeDevice(reasons=reasons, failing={new: pynvml.NVMLError_FunctionNotFound}))).read()
    assert gpu.throttled is True
    failing = dict.fromkeys((new, old), pynvml.NVMLError_NotSupported)
    (gpu,) = NvmlGpus(FakeNvml(FakeDevice(reasons=reasons, failing=failing))).read()
    assert gpu.throttled is None


def test_a_device_that_tells_nothing_is_still_listed() -> None:
    functions = [name for name in dir(FakeNvml) if name.startswith("nvmlDeviceGet")]
    failing = dict.fromkeys(functions, pynvml.NVMLError_GpuIsLost)
    del failing["nvmlDeviceGetHandleByIndex"], failing["nvmlDeviceGetCount"]
    (gpu,) = NvmlGpus(FakeNvml(FakeDevice(failing=failing))).read()
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes, gpu.utilization) == (0, 0, None)
    assert gpu.problem


def test_a_device_that_cannot_be_opened_does_not_hide_the_others() -> None:
    broken = FakeDevice(failing={"nvmlDeviceGetHandleByIndex": pynvml.NVMLError_NoPermission})
    gpus = NvmlGpus(FakeNvml(broken, FakeDevice(uuid="GPU-1")))
    (gpu,) = gpus.read()
    assert (gpu.index, gpu.uuid) == (1, "GPU-1")
    assert "GPU 0" in gpus.problem


def test_a_gpu_that_the_engine_cannot_use_comes_with_the_fix() -> None:
    fix = "rebuild: CHORUS_LLAMA_BACKEND=cuda make setup"
    with Inventory("node-1", gpu_support=GpuSupport(False, fix), gpus=NvmlGpus(FakeNvml(FakeDevice()))) as inventory:
        (gpu,) = inventory.node().gpus
        assert (gpu.usable, gpu.problem) == (False, fix)
        assert inventory.sample_load().gpus == (gpu,)
    with Inventory("node-1", gpu_support=GpuSupport(True, fix), gpus=NvmlGpus(FakeNvml(FakeDevice()))) as inventory:
        (gpu,) = inventory.node().gpus
        assert (gpu.usable, gpu.problem) == (True, "")


def test_free_memory_is_told_by_the_place_on_the_bus() -> None:
    failing = {"nvmlDeviceGetPciInfo": pynvml.NVMLError_NotSupported}
    silent = {"nvmlDeviceGetMemoryInfo": pynvml.NVMLError_GpuIsLost}
    nvml = FakeNvml(
        FakeDevice(bus_id=b"00000000:C1:00.0", free=5),
        FakeDevice(bus_id="00000001:0A:00.0", free=6),
        FakeDevice(failing=failing),
        FakeDevice(bus_id="00000000:02:00.0", failing=silent),
    )
    assert NvmlGpus(nvml).free_by_bus() == {"0000:c1:00.0": 5, "0001:0a:00.0": 6}
