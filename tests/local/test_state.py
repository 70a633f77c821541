"""The state file, and telling a process from another one that got its pid later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import ConfigError
from chorus.local.state import MeshState, ProcessRef, ProcessState, this_process

REFS = st.builds(ProcessRef, pid=st.integers(1, 1 << 22), started_at=st.floats(0, 4e9))
PROCESSES = st.builds(
    ProcessState,
    name=st.text(max_size=20),
    role=st.sampled_from(["registry", "runner", "coordinator"]),
    address=st.text(max_size=20),
    phase=st.sampled_from(["starting", "healthy", "down"]),
    log=st.text(max_size=20),
    config=st.text(max_size=20),
    process=st.none() | REFS,
    failures=st.integers(0, 5),
    starts=st.integers(0, 99),
    last_end=st.text(max_size=20),
)
STATES = st.builds(
    MeshState,
    supervisor=REFS,
    phase=st.sampled_from(["starting", "ready", "stopping"]),
    supervised=st.booleans(),
    trust_domain=st.text(max_size=20),
    certs_dir=st.text(max_size=20),
    coordinator=st.text(max_size=20),
    identity=st.text(max_size=20),
    insecure_loopback=st.booleans(),
    models=st.lists(st.text(max_size=9), max_size=3).map(tuple),
    processes=st.lists(PROCESSES, max_size=4).map(tuple),
)


@given(state=STATES)
def test_what_is_written_is_read(state: MeshState, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "mesh.json"
    state.write(path)
    assert MeshState.read(path) == state


@given(state=STATES)
def test_what_a_newer_version_added_is_passed_over(state: MeshState, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "mesh.json"
    state.write(path)
    data = json.loads(path.read_text("utf-8"))
    for part in (data, *data["processes"]):
        part["something_new"] = {"of": "any kind"}
    path.write_text(json.dumps(data), "utf-8")
    assert MeshState.read(path) == state


def test_no_file_is_no_mesh(tmp_path: Path) -> None:
    assert MeshState.read(tmp_path / "mesh.json") is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "supervisor": 7}', "\x00"])
def test_a_file_of_something_else_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mesh.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"mesh\.json"):
        MeshState.read(path)


def test_this_process_lives_and_a_later_holder_of_its_pid_is_somebody_else() -> None:
    here = this_process()
    assert here.pid == os.getpid()
    assert here.alive
    assert not replace(here, started_at=here.started_at - 60).alive


def test_a_process_that_ended_is_not_alive_even_before_its_parent_notices() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        ref = ProcessRef.of(child.pid)
        assert ref is not None
        assert ref.alive
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie until it is waited for
        assert not ref.alive
    assert not ref.alive
    assert ProcessRef.of(child.pid) is None
