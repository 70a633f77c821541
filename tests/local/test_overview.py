"""What is said to be wrong with a mesh, from what its coordinator and its supervisor tell."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chorus.client import MeshNodes, RegistrySeen
from chorus.core.fleet.events import LeasedRecord
from chorus.core.fleet.listing import list_nodes
from chorus.core.fleet.records import (
    Cpu,
    Load,
    ModelState,
    ModelStatus,
    Node,
    Runner,
    RunnerRecord,
    RunnerState,
)
from chorus.local.overview import Overview
from chorus.local.state import MeshState, ProcessRef, ProcessState, this_process
from chorus.testing.engine_fake import fake_artifact

REGISTRY = RegistrySeen("registry@127.0.0.1:7101", connected=True, synced=True, problem="", last_heard_s=0.1)
MODEL = ModelStatus(fake_artifact(), "fake", ModelState.LOADED, frozenset(), 4096, 4)
LOCAL = MeshState(this_process(), "ready", True, "chorus.local", "/certs", "coordinator@127.0.0.1:7301", "client-cli")
PROCESS = ProcessState("runner-1", "runner", "127.0.0.1:7201", "healthy", "/log", "/config")
REGISTRY_HERE = replace(PROCESS, name="registry", role="registry", address="127.0.0.1:7101")


def overview(
    *states: RunnerState,
    model: ModelStatus = MODEL,
    registries: tuple[RegistrySeen, ...] = (REGISTRY,),
    local: MeshState | None = None,
) -> Overview:
    records = [
        RunnerRecord(
            Runner(f"runner-{index}", 1, "attic", "127.0.0.1:7201", "name", "0", (), (model,)),
            Node("attic", "attic", "Linux", Cpu("cpu", 2, 4), 8 << 30, 4 << 30),
            state,
            Load(),
            sequence=1,
        )
        for index, state in enumerate(states, start=1)
    ]
    page = list_nodes([LeasedRecord(record) for record in records])
    return Overview(MeshNodes(page.nodes, registries, synced=True), local)


def test_a_mesh_that_is_all_there_has_no_problems() -> None:
    assert (
        overview(RunnerState.READY, RunnerState.STARTING, local=replace(LOCAL, processes=(PROCESS,))).problems() == []
    )


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (overview(), "no runner is in the directory"),
        (overview(RunnerState.STARTING, RunnerState.DRAINING), "no runner is ready"),
        (
            overview(RunnerState.READY, registries=(replace(REGISTRY, connected=False, problem="refused"),)),
            "registry registry@127.0.0.1:7101 cannot be reached: refused",
        ),
        (
            overview(RunnerState.READY, model=replace(MODEL, state=ModelState.FAILED, error="too big")),
            "runner-1 could not load fake-1b.Q8_0.gguf: too big",
        ),
        (
            overview(
                RunnerState.READY,
                local=replace(LOCAL, processes=(replace(PROCESS, phase="down", last_end="exited with code 1"),)),
            ),
            "runner-1 on this machine is left down: it exited with code 1",
        ),
        (
            overview(RunnerState.READY, local=replace(LOCAL, supervisor=ProcessRef(this_process().pid, 0.0))),
            "the supervisor of the mesh on this machine has gone; `chorus up` starts it again",
        ),
        (
            overview(RunnerState.READY, local=replace(LOCAL, processes=(REGISTRY_HERE, replace(PROCESS, name="two")))),
            "two on this machine runs, but its registry does not hear from it; its log: /log",
        ),
    ],
)
def test_each_trouble_is_said(seen: Overview, words: str) -> None:
    assert seen.problems() == [words]


@pytest.mark.parametrize(
    "processes",
    [
        (REGISTRY_HERE, PROCESS),
        (REGISTRY_HERE, replace(PROCESS, name="two", phase="starting")),
        # Left down by the supervisor, started again by hand.
        (REGISTRY_HERE, replace(PROCESS, phase="down", last_end="was killed by SIGKILL")),
        # The directory that was asked is another mesh's.
        (replace(REGISTRY_HERE, address="127.0.0.1:9101"), replace(PROCESS, name="two")),
    ],
)
def test_a_runner_is_missed_only_where_it_should_be(processes: tuple[ProcessState, ...]) -> None:
    assert overview(RunnerState.READY, local=replace(LOCAL, processes=processes)).problems() == []
