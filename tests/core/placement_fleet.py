"""Directories for tests of placement: built by hand in few words, or by hypothesis."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hypothesis import strategies as st

from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import (
    Artifact,
    Cpu,
    EngineInfo,
    EngineKind,
    Feature,
    Load,
    ModelLoad,
    ModelState,
    ModelStatus,
    Node,
    Runner,
    RunnerRecord,
    RunnerState,
    Tier,
)
from chorus.core.placement import Needs, Situation, Work

GIB = 1 << 30


def artifact(
    family: str = "alpha",
    name: str = "",
    *,
    size_bytes: int = GIB,
    tier: Tier = Tier.SMALL,
    tags: tuple[str, ...] = ("chat",),
    parameter_count: int = 1_000_000_000,
) -> Artifact:
    name = name or f"{family}.gguf"
    sha256 = (name.encode().hex() * 64)[:64]
    return Artifact(family, name, sha256, size_bytes, "Q8_0", parameter_count, 8192, "llama", tier, tags)


def model(
    family: str = "alpha",
    name: str = "",
    *,
    state: ModelState = ModelState.LOADED,
    features: frozenset[Feature] = frozenset({Feature.CHAT}),
    context_length: int = 4096,
    slots: int = 4,
    engine: str = "local",
    error: str = "",
    size_bytes: int = GIB,
    tier: Tier = Tier.SMALL,
    tags: tuple[str, ...] = ("chat",),
    parameter_count: int = 1_000_000_000,
    adapters: tuple[str, ...] = (),
) -> ModelStatus:
    made = artifact(family, name, size_bytes=size_bytes, tier=tier, tags=tags, parameter_count=parameter_count)
    return ModelStatus(made, engine, state, features, context_length, slots, error, adapters)


LOCAL = EngineInfo("local", "1", EngineKind.LOCAL, ("cpu",))
HOUSE = EngineInfo("house", "1", EngineKind.REMOTE, plaintext=True)
PAID = EngineInfo("paid", "1", EngineKind.EXTERNAL)


def runner(
    runner_id: str,
    *models: ModelStatus,
    node_id: str = "",
    state: RunnerState = RunnerState.READY,
    reachable: bool = True,
    labels: Mapping[str, str] | None = None,
    node_labels: Mapping[str, str] | None = None,
    loads: tuple[ModelLoad, ...] = (),
    memory: int = 16 * GIB,
    sequence: int = 1,
) -> DirectoryEntry:
    node = Node(
        node_id or f"node-{runner_id}", runner_id, "linux", Cpu("cpu", 4, 8), memory, memory, (), node_labels or {}
    )
    about = Runner(
        runner_id=runner_id,
        incarnation=1,
        node_id=node.node_id,
        address="127.0.0.1:1",
        server_name=f"{runner_id}.runner.test",
        version="1",
        engines=(LOCAL, HOUSE, PAID),
        models=models,
        labels=labels or {},
    )
    return DirectoryEntry(RunnerRecord(about, node, state, Load(loads), sequence), 0.0, reachable)


def load(name: str = "alpha.gguf", *, used: int = 0, total: int = 4, queued: int = 0, rate: float = 0.0) -> ModelLoad:
    return ModelLoad(name, used, total, queued, tokens_per_second=rate)


def directory(*entries: DirectoryEntry, synced: bool = True, version: int = 1) -> Directory:
    return Directory(
        version, MappingProxyType({entry.record.runner.runner_id: entry for entry in entries}), synced=synced
    )


# --- by hypothesis --------------------------------------------------------------------------------------------------

FAMILIES = ("alpha", "beta", "gamma")
FEATURES = (Feature.CHAT, Feature.TOOLS, Feature.JSON_SCHEMA, Feature.EMBED)
TAGS = ("chat", "code", "embedding")
ADAPTERS = ("pirate", "poet")
LABELS = st.dictionaries(st.sampled_from(["room", "owner"]), st.sampled_from(["attic", "cellar"]), max_size=2)


@st.composite
def models(draw: st.DrawFn) -> ModelStatus:
    family = draw(st.sampled_from(FAMILIES))
    return model(
        family,
        f"{family}.{draw(st.sampled_from(['q4', 'q8']))}",
        state=draw(st.sampled_from(ModelState)),
        features=draw(st.frozensets(st.sampled_from(FEATURES), max_size=4)),
        context_length=draw(st.sampled_from([0, 512, 4096])),
        slots=draw(st.integers(0, 4)),
        engine=draw(st.sampled_from(["local", "house", "paid", "undescribed"])),
        size_bytes=draw(st.sampled_from([0, GIB, 99 * GIB])),
        tier=draw(st.sampled_from([Tier.MICRO, Tier.SMALL])),
        tags=tuple(draw(st.sets(st.sampled_from(TAGS), max_size=2))),
        adapters=tuple(draw(st.sets(st.sampled_from(ADAPTERS), max_size=2))),
    )


@st.composite
def entries(draw: st.DrawFn, runner_id: str) -> DirectoryEntry:
    has = draw(st.lists(models(), max_size=3, unique_by=lambda status: status.artifact.name))
    return runner(
        runner_id,
        *has,
        node_id=draw(st.sampled_from(["n1", "n2", "n3"])),
        state=draw(st.sampled_from([RunnerState.READY] * 3 + [RunnerState.STARTING, RunnerState.DRAINING])),
        reachable=draw(st.integers(0, 4)) > 0,
        labels=draw(LABELS),
        node_labels=draw(LABELS),
        loads=tuple(
            load(
                status.artifact.name,
                used=draw(st.integers(0, 4)),
                total=draw(st.integers(0, 4)),
                queued=draw(st.sampled_from([0, 1, 200])),
                rate=draw(st.sampled_from([0.0, 5.0, 50.0])),
            )
            for status in has
            if draw(st.booleans())
        ),
    )


@st.composite
def directories(draw: st.DrawFn, max_size: int = 6) -> Directory:
    count = draw(st.integers(0, max_size))
    return directory(*(draw(entries(f"r{number}")) for number in range(count)), synced=draw(st.booleans()))


runner_sets = st.frozensets(st.sampled_from([f"r{number}" for number in range(7)]), max_size=3)
needs = st.builds(
    Needs,
    work=st.sampled_from(Work),
    model=st.sampled_from(["", *FAMILIES, "alpha.q4", "nothing"]),
    features=st.frozensets(st.sampled_from(FEATURES), max_size=2),
    adapter=st.sampled_from(["", "", "", *ADAPTERS]),
    labels=LABELS,
    tier=st.none() | st.sampled_from([Tier.MICRO, Tier.SMALL]),
    tags=st.frozensets(st.sampled_from(TAGS), max_size=1),
    context_length=st.sampled_from([0, 400, 2000, 9000]),
    artifact_sha256=st.sampled_from(["", "", artifact("alpha", "alpha.q4").sha256]),
    runner_ids=st.just(frozenset()) | runner_sets,
    node_ids=st.just(frozenset()) | st.frozensets(st.sampled_from(["n1", "n4"]), max_size=2),
    private=st.booleans(),
    allow_external=st.booleans(),
)
situations = st.builds(
    Situation,
    in_flight=st.dictionaries(st.sampled_from([f"r{number}" for number in range(6)]), st.integers(-3, 90)),
    tried=runner_sets,
    barred=st.frozensets(
        st.tuples(st.sampled_from([f"r{number}" for number in range(6)]), st.sampled_from(["alpha.q4", "beta.q8"])),
        max_size=6,
    ),
    penalties=st.dictionaries(st.sampled_from([f"r{number}" for number in range(6)]), st.floats(0, 100)),
)
