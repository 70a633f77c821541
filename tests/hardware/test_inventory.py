"""This machine as a node: memory with and without a container's limit, processor, load."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from chorus.hardware import Inventory, NvmlGpus
from chorus.hardware.cgroup import MemoryLimit, memory_limit
from chorus.hardware.cpu import read_cpu
from tests.hardware.fake_nvml import FakeDevice, FakeNvml


def test_this_machine_is_told_as_a_node() -> None:
    with Inventory("node-1", labels={"room": "attic"}) as inventory:
        node = inventory.node()
    assert node.node_id == "node-1"
    assert node.hostname
    assert node.os
    assert node.cpu.model
    assert 1 <= node.cpu.physical_cores <= node.cpu.logical_cores
    assert 0 < node.memory_available_bytes <= node.memory_total_bytes <= psutil.virtual_memory().total
    assert node.labels == {"room": "attic"}


def test_a_load_sample_has_everything_in_its_range() -> None:
    with Inventory("node-1", gpus=NvmlGpus(FakeNvml(FakeDevice(busy=50)))) as inventory:
        for _ in range(3):
            load = inventory.sample_load()
            assert 0.0 <= load.cpu_utilization <= 1.0
            assert 0 < load.memory_available_bytes <= load.memory_total_bytes
            assert load.gpus[0].utilization == 0.5


def test_processor_time_that_was_spent_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [(30.0, 40.0), (33.0, 50.0), (33.0, 50.0), (41.0, 60.0)]  # busy, in all
    monkeypatch.setattr("chorus.hardware.inventory._cpu_times", lambda: times.pop(0))
    with Inventory("node-1") as inventory:
        assert inventory.sample_load().cpu_utilization == pytest.approx(0.3)
        assert inventory.sample_load().cpu_utilization == 0.0, "no time has passed"
        assert inventory.sample_load().cpu_utilization == pytest.approx(0.8)


def test_a_container_has_no_more_than_its_limit() -> None:
    with Inventory("node-1", limit=lambda: MemoryLimit(64 << 20, 16 << 20)) as inventory:
        node = inventory.node()
        assert (node.memory_total_bytes, node.memory_available_bytes) == (64 << 20, 16 << 20)
        assert inventory.sample_load().memory_available_bytes == 16 << 20


def test_a_limit_above_the_machine_is_no_limit() -> None:
    with Inventory("node-1", limit=lambda: MemoryLimit(1 << 62, 1 << 62)) as inventory:
        assert inventory.node().memory_total_bytes == psutil.virtual_memory().total


# --- control groups -------------------------------------------------------------------------------------------------


def cgroup(root: Path, directory: str, **files: object) -> None:
    folder = root / directory
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_version_2_reads_the_group_itself_and_those_around_it(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/system.slice/chorus.service\n")
    root = tmp_path / "fs"
    inner = {"memory__max": "max", "memory__current": 500, "memory__stat": "anon 400\ninactive_file 100"}
    cgroup(root, "system.slice/chorus.service", **inner)
    assert memory_limit(root=root, self_cgroup=tmp_path / "self") is None
    cgroup(root, "system.slice", memory__max=1000, memory__current=700, memory__stat="inactive_file 300")
    assert memory_limit(root=root, self_cgroup=tmp_path / "self") == MemoryLimit(1000, 600)
    cgroup(root, "system.slice/chorus.service", memory__max=800)
    assert memory_limit(root=root, self_cgroup=tmp_path / "self") == MemoryLimit(800, 400)


def test_a_container_sees_only_the_root_of_its_own_group(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/../../kubepods/pod1\n")
    cgroup(tmp_path / "fs", ".", memory__max=2048, memory__current=48, memory__stat="anon 48")
    assert memory_limit(root=tmp_path / "fs", self_cgroup=tmp_path / "self") == MemoryLimit(2048, 2000)


def test_version_1_is_read_as_well(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
    files = {
        "memory__limit_in_bytes": 4096,
        "memory__usage_in_bytes": 5000,
        "memory__stat": "cache 1\ntotal_inactive_file 0",
    }
    cgroup(tmp_path / "fs", "memory", **files)
    assert memory_limit(root=tmp_path / "fs", self_cgroup=tmp_path / "self") == MemoryLimit(4096, 0)


@pytest.mark.parametrize("text", ["", "nonsense", "0::\n:::\n", "0::/a\n"])
def test_a_system_without_readable_groups_has_no_limit(tmp_path: Path, text: str) -> None:
    (tmp_path / "self").write_text(text)
    assert memory_limit(root=tmp_path / "fs", self_cgroup=tmp_path / "self") is None
    assert memory_limit(root=tmp_path / "fs", self_cgroup=tmp_path / "missing") is None


# --- the processor --------------------------------------------------------------------------------------------------


def test_instruction_sets_that_matter_are_told(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t\t: fpu sse4_2 avx2 nothing\n\n"
        "processor\t: 1\nflags\t: amx_int8\n"
    )
    cpu = read_cpu(tmp_path / "cpuinfo")
    assert cpu.model == "Some CPU @ 3 GHz"
    assert cpu.features == ("sse4_2", "avx2")


def test_an_arm_processor_and_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    assert read_cpu(tmp_path / "cpuinfo").features == ("asimd", "asimddp", "i8mm")
    assert read_cpu(tmp_path / "missing").features == ()
    assert read_cpu(tmp_path / "missing").model
