"""Records for tests of the fleet."""

from __future__ import annotations

from chorus.core.fleet.records import (
    Artifact,
    Cpu,
    EngineInfo,
    EngineKind,
    Feature,
    Load,
    ModelState,
    ModelStatus,
    Node,
    Runner,
    RunnerRecord,
    RunnerState,
    Tier,
)

READY = RunnerState.READY


def node(node_id: str = "n", **changes: object) -> Node:
    """A machine."""
    fields: dict[str, object] = {
        "node_id": node_id,
        "hostname": node_id,
        "os": "Linux",
        "cpu": Cpu("cpu", 2, 4),
        "memory_total_bytes": 8 << 30,
        "memory_available_bytes": 4 << 30,
    }
    return Node(**(fields | changes))  # type: ignore[arg-type]


def model(name: str = "m.gguf", family: str = "m", *, tier: Tier = Tier.MICRO, features: str = "chat") -> ModelStatus:
    """A loaded model; `features` are names with spaces between them."""
    artifact = Artifact(family, name, "ab" * 32, 1, "Q8_0", 1, 4096, "llama", tier)
    return ModelStatus(artifact, "e", ModelState.LOADED, frozenset(map(Feature, features.split())), 4096, 4)


def record(
    runner_id: str = "r",
    incarnation: int = 1,
    sequence: int = 1,
    *,
    machine: Node | None = None,
    state: RunnerState = READY,
    load: Load | None = None,
    models: tuple[ModelStatus, ...] = (),
    labels: dict[str, str] | None = None,
) -> RunnerRecord:
    """A runner as a registry would hold it."""
    machine = machine or node()
    runner = Runner(
        runner_id=runner_id,
        incarnation=incarnation,
        node_id=machine.node_id,
        address="127.0.0.1:7201",
        server_name=f"{runner_id}.runner.chorus.local",
        version="0",
        engines=(EngineInfo("e", "1", EngineKind.LOCAL),),
        models=models,
        labels=labels or {},
    )
    return RunnerRecord(runner, machine, state, load or Load(), sequence)
