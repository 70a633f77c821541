"""The id of a machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import chorus
from chorus.core.errors import ConfigError
from chorus.hardware import node_id


def test_it_is_the_same_every_time_and_does_not_show_the_machine_id(tmp_path: Path) -> None:
    machine_id = tmp_path / "machine-id"
    machine_id.write_text("0123456789abcdef0123456789abcdef\n")
    first = node_id(tmp_path / "state", machine_id_files=[machine_id])
    assert first == node_id(tmp_path / "elsewhere", machine_id_files=[machine_id])
    assert first.startswith("node-")
    assert len(first) == len("node-") + 16
    assert "0123456789abcdef" not in first
    assert not (tmp_path / "state").exists()
    machine_id.write_text("0123456789abcdef0123456789abcdee\n")
    assert node_id(tmp_path, machine_id_files=[machine_id]) != first


@pytest.mark.parametrize("content", ["", "uninitialized\n", "0" * 32, "zz", "\xff" * 32])
def test_without_a_machine_id_one_is_made_and_kept(tmp_path: Path, content: str) -> None:
    machine_id = tmp_path / "machine-id"
    machine_id.write_text(content, encoding="latin-1")
    made = node_id(tmp_path / "state", machine_id_files=[tmp_path / "missing", machine_id])
    assert made == node_id(tmp_path / "state", machine_id_files=[machine_id])
    assert made != node_id(tmp_path / "other", machine_id_files=[machine_id])


def test_processes_that_start_at_once_agree(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from chorus.hardware.identity import node_id; "
    program += "sys.stdin.readline(); print(node_id(Path(sys.argv[1]), machine_id_files=[]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "state")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(Path(chorus.__file__).parents[1])},
        )
        for _ in range(3)
    ]
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        ids = {process.communicate(timeout=60)[0].strip() for process in processes}
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert len(ids) == 1
    assert ids.pop().startswith("node-")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["node-id"]


def test_an_override_wins_and_must_be_a_name(tmp_path: Path) -> None:
    assert node_id(tmp_path, override="attic-1") == "attic-1"
    for wrong in ("", "Attic", "a_b", "-a", "a" * 64, "../x"):
        with pytest.raises(ConfigError, match="node id"):
            node_id(tmp_path, override=wrong)


def test_a_damaged_or_unwritable_state_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "node-id").write_text("NOT A NAME\n")
    with pytest.raises(ConfigError, match="node-id"):
        node_id(tmp_path, machine_id_files=[])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"runner\.node_id"):
        node_id(tmp_path / "file" / "state", machine_id_files=[])
