"""Stopping a mesh from outside, when its supervisor is not there to do it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from chorus.local.home import MeshHome
from chorus.local.launch import AlreadyUpError, locked
from chorus.local.state import MeshState, ProcessRef, ProcessState
from chorus.local.stop import stop_mesh

GONE = ProcessRef(pid=2**22 - 1, started_at=1.0)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for input which never comes."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
def home(tmp_path: Path) -> MeshHome:
    found = MeshHome(tmp_path, chosen=True)
    found.make()
    return found


def write_state(home: MeshHome, process: ProcessRef) -> None:
    state = ProcessState("runner-1", "runner", "127.0.0.1:7201", "healthy", "", "", process)
    MeshState(GONE, "ready", True, "", "", "", "", processes=(state,)).write(home.state_file)


def test_what_outlived_its_supervisor_is_ended(home: MeshHome, bystander: subprocess.Popen[bytes]) -> None:
    ref = ProcessRef.of(bystander.pid)
    assert ref is not None
    write_state(home, ref)
    report = stop_mesh(home, timeout_s=5)
    assert (report.was_up, report.left_over) == (False, ("runner-1",))
    assert not ref.alive
    assert not home.state_file.exists()


def test_whoever_got_the_pid_later_is_left_alone(home: MeshHome, bystander: subprocess.Popen[bytes]) -> None:
    ref = ProcessRef.of(bystander.pid)
    assert ref is not None
    write_state(home, replace(ref, started_at=ref.started_at - 3600))
    assert stop_mesh(home, timeout_s=5).left_over == ()
    assert bystander.poll() is None


def test_nothing_up_is_nothing_to_do(home: MeshHome) -> None:
    assert not stop_mesh(home, timeout_s=5).was_up


def test_only_one_may_bring_a_mesh_up(home: MeshHome) -> None:
    with locked(home):
        write_state(home, GONE)
        with pytest.raises(AlreadyUpError, match=f"process {GONE.pid}") as caught, locked(home):
            pass
        assert caught.value.state is not None
    with locked(home):
        pass
