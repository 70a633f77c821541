"""Nodes, runners, models and load: between `chorus.api.runner.v1` and `chorus.core.fleet.records`.

`encode_*` never fails. `decode_*` raises `InvalidRequestError`, naming the field, where a message lacks what it must
have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration

from chorus.api.inference.v1 import generation_pb2
from chorus.api.runner.v1 import resources_pb2 as pb
from chorus.core.errors import InvalidRequestError
from chorus.core.fleet.records import (
    Artifact,
    Cpu,
    EngineInfo,
    EngineKind,
    Feature,
    Gpu,
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

K = TypeVar("K")
V = TypeVar("V")

UINT32_MAX = 2**32 - 1


def _inverse(table: dict[K, V]) -> dict[V, K]:
    return {value: key for key, value in table.items()}


def _by_name(core_enum: Any, wire_enum: Any, prefix: str) -> dict[Any, Any]:
    """Pairs the members of a core enum with the wire enum's values of the same name; a missing pair fails at import."""
    return {member: wire_enum.Value(f"{prefix}_{member.name}") for member in core_enum}


FEATURES: dict[Feature, pb.Feature.ValueType] = _by_name(Feature, pb.Feature, "FEATURE")
TIERS: dict[Tier, generation_pb2.Tier.ValueType] = _by_name(Tier, generation_pb2.Tier, "TIER")
RUNNER_STATES: dict[RunnerState, pb.RunnerState.ValueType] = _by_name(RunnerState, pb.RunnerState, "RUNNER_STATE")
MODEL_STATES: dict[ModelState, pb.ModelState.ValueType] = _by_name(ModelState, pb.ModelState, "MODEL_STATE")
ENGINE_KINDS: dict[EngineKind, pb.EngineKind.ValueType] = _by_name(EngineKind, pb.EngineKind, "ENGINE_KIND")

_FEATURES_BACK = _inverse(FEATURES)
_TIERS_BACK = _inverse(TIERS)
_RUNNER_STATES_BACK = _inverse(RUNNER_STATES)
_MODEL_STATES_BACK = _inverse(MODEL_STATES)
_ENGINE_KINDS_BACK = _inverse(ENGINE_KINDS)


# --- durations ------------------------------------------------------------------------------------------------------


def encode_duration(seconds: float) -> Duration:
    """A Duration of `seconds`, to the nanosecond."""
    message = Duration()
    set_duration(message, seconds)
    return message


def set_duration(message: Duration, seconds: float) -> None:
    """Makes it a Duration of `seconds`, to the nanosecond."""
    nanos = round(seconds * 1e9)
    sign = -1 if nanos < 0 else 1
    whole, rest = divmod(abs(nanos), 1_000_000_000)
    message.seconds, message.nanos = sign * whole, sign * rest


def decode_duration(message: Duration) -> float:
    """Seconds."""
    return float(message.seconds) + message.nanos * 1e-9


def _finite(value: float) -> float:
    """What a peer reports is compared and added up: NaN and infinity become 0."""
    return value if math.isfinite(value) else 0.0


# --- enums ----------------------------------------------------------------------------------------------------------


def encode_features(features: Iterable[Feature]) -> list[pb.Feature.ValueType]:
    """Sorted wire values."""
    return sorted(FEATURES[feature] for feature in features)


def decode_features(values: Iterable[pb.Feature.ValueType]) -> frozenset[Feature]:
    """Features; those of a newer version that this one does not know are left out."""
    return frozenset(_FEATURES_BACK[value] for value in values if value in _FEATURES_BACK)


def decode_tier(value: generation_pb2.Tier.ValueType) -> Tier | None:
    """A tier, or None where unspecified or unknown."""
    return _TIERS_BACK.get(value)


def decode_runner_state(value: pb.RunnerState.ValueType) -> RunnerState | None:
    """A state, or None where unspecified or unknown."""
    return _RUNNER_STATES_BACK.get(value)


# --- resources ------------------------------------------------------------------------------------------------------


def encode_cpu(cpu: Cpu) -> pb.Cpu:
    """A processor."""
    return pb.Cpu(
        model=cpu.model,
        physical_core_count=cpu.physical_cores,
        logical_core_count=cpu.logical_cores,
        features=cpu.features,
    )


def decode_cpu(message: pb.Cpu) -> Cpu:
    """A processor."""
    return Cpu(
        model=message.model,
        physical_cores=message.physical_core_count,
        logical_cores=message.logical_core_count,
        features=tuple(message.features),
    )


def encode_gpu(gpu: Gpu) -> pb.Gpu:
    """A graphics device."""
    return pb.Gpu(
        index=gpu.index,
        uuid=gpu.uuid,
        name=gpu.name,
        memory_total_bytes=gpu.memory_total_bytes,
        memory_free_bytes=gpu.memory_free_bytes,
        driver_version=gpu.driver_version,
        utilization=gpu.utilization,
        temperature_celsius=gpu.temperature_celsius,
        throttled=gpu.throttled,
        usable=gpu.usable,
        problem=gpu.problem,
    )


def decode_gpu(message: pb.Gpu) -> Gpu:
    """A graphics device."""
    return Gpu(
        index=message.index,
        uuid=message.uuid,
        name=message.name,
        memory_total_bytes=message.memory_total_bytes,
        memory_free_bytes=message.memory_free_bytes,
        driver_version=message.driver_version,
        utilization=_finite(message.utilization) if message.HasField("utilization") else None,
        temperature_celsius=_finite(message.temperature_celsius) if message.HasField("temperature_celsius") else None,
        throttled=message.throttled if message.HasField("throttled") else None,
        usable=message.usable,
        problem=message.problem,
    )


def encode_node(node: Node) -> pb.Node:
    """A machine."""
    return pb.Node(
        node_id=node.node_id,
        hostname=node.hostname,
        os=node.os,
        cpu=encode_cpu(node.cpu),
        memory_total_bytes=node.memory_total_bytes,
        memory_available_bytes=node.memory_available_bytes,
        gpus=[encode_gpu(gpu) for gpu in node.gpus],
        labels=node.labels,
    )


def decode_node(message: pb.Node) -> Node:
    """A machine. It must have an id."""
    if not message.node_id:
        raise InvalidRequestError("node.node_id", "must not be empty")
    return Node(
        node_id=message.node_id,
        hostname=message.hostname,
        os=message.os,
        cpu=decode_cpu(message.cpu),
        memory_total_bytes=message.memory_total_bytes,
        memory_available_bytes=message.memory_available_bytes,
        gpus=tuple(decode_gpu(gpu) for gpu in message.gpus),
        labels=dict(message.labels),
    )


def encode_artifact(artifact: Artifact) -> pb.Artifact:
    """One file of a model family."""
    return pb.Artifact(
        family=artifact.family,
        name=artifact.name,
        sha256=artifact.sha256,
        size_bytes=artifact.size_bytes,
        quantization=artifact.quantization,
        parameter_count=artifact.parameter_count,
        context_length=min(artifact.context_length, UINT32_MAX),
        architecture=artifact.architecture,
        tier=TIERS[artifact.tier],
        tags=artifact.tags,
        license=artifact.license,
    )


def decode_artifact(message: pb.Artifact) -> Artifact:
    """One file of a model family; a missing tier follows from the number of parameters."""
    if not message.name:
        raise InvalidRequestError("artifact.name", "must not be empty")
    return Artifact(
        family=message.family or message.name,
        name=message.name,
        sha256=message.sha256,
        size_bytes=message.size_bytes,
        quantization=message.quantization,
        parameter_count=message.parameter_count,
        context_length=message.context_length,
        architecture=message.architecture,
        tier=decode_tier(message.tier) or Tier.of_parameters(message.parameter_count),
        tags=tuple(message.tags),
        license=message.license,
    )


def encode_model_status(status: ModelStatus, *, with_artifact: bool = True) -> pb.ModelStatus:
    """A model as a runner has it."""
    return pb.ModelStatus(
        artifact=encode_artifact(status.artifact) if with_artifact else None,
        engine=status.engine,
        state=MODEL_STATES[status.state],
        features=encode_features(status.features),
        context_length=status.context_length,
        slot_count=status.slot_count,
        error=status.error,
        adapters=status.adapters,
    )


def decode_model_status(message: pb.ModelStatus) -> ModelStatus:
    """A model as a runner has it; an unknown state counts as failed, so that nothing is placed there."""
    return ModelStatus(
        artifact=decode_artifact(message.artifact),
        engine=message.engine,
        state=_MODEL_STATES_BACK.get(message.state, ModelState.FAILED),
        features=decode_features(message.features),
        context_length=message.context_length,
        slot_count=message.slot_count,
        error=message.error,
        adapters=tuple(message.adapters),
    )


def encode_engine(engine: EngineInfo) -> pb.Engine:
    """What generates tokens."""
    return pb.Engine(
        name=engine.name,
        version=engine.version,
        kind=ENGINE_KINDS[engine.kind],
        backends=engine.backends,
        plaintext=engine.plaintext,
    )


def decode_engine(message: pb.Engine) -> EngineInfo:
    """What generates tokens; an unknown kind counts as external, the most careful reading."""
    return EngineInfo(
        name=message.name,
        version=message.version,
        kind=_ENGINE_KINDS_BACK.get(message.kind, EngineKind.EXTERNAL),
        backends=tuple(message.backends),
        plaintext=message.plaintext,
    )


def encode_runner(runner: Runner) -> pb.Runner:
    """One ModelRunner service."""
    return pb.Runner(
        runner_id=runner.runner_id,
        incarnation=runner.incarnation,
        node_id=runner.node_id,
        address=runner.address,
        server_name=runner.server_name,
        version=runner.version,
        engines=[encode_engine(engine) for engine in runner.engines],
        models=[encode_model_status(model) for model in runner.models],
        labels=runner.labels,
    )


def decode_runner(message: pb.Runner) -> Runner:
    """One ModelRunner service. It must have an id, an incarnation, an address and a server name."""
    for field in ("runner_id", "address", "server_name"):
        if not getattr(message, field):
            raise InvalidRequestError(f"runner.{field}", "must not be empty")
    if message.incarnation == 0:
        raise InvalidRequestError("runner.incarnation", "must be greater than 0")
    return Runner(
        runner_id=message.runner_id,
        incarnation=message.incarnation,
        node_id=message.node_id,
        address=message.address,
        server_name=message.server_name,
        version=message.version,
        engines=tuple(decode_engine(engine) for engine in message.engines),
        models=tuple(decode_model_status(model) for model in message.models),
        labels=dict(message.labels),
    )


def encode_model_load(load: ModelLoad) -> pb.ModelLoad:
    """The load of one model."""
    return pb.ModelLoad(
        model=load.model,
        slots_used_count=load.slots_used,
        slots_total_count=load.slots_total,
        queued_count=load.queued,
        kv_used_token_count=load.kv_used_tokens,
        kv_total_token_count=load.kv_total_tokens,
        tokens_per_second=load.tokens_per_second,
        kv_cached_token_count=load.kv_cached_tokens,
        prompt_tokens_per_second=load.prompt_tokens_per_second,
        preemption_count=load.preemptions,
    )


def decode_model_load(message: pb.ModelLoad) -> ModelLoad:
    """The load of one model."""
    return ModelLoad(
        model=message.model,
        slots_used=message.slots_used_count,
        slots_total=message.slots_total_count,
        queued=message.queued_count,
        kv_used_tokens=message.kv_used_token_count,
        kv_total_tokens=message.kv_total_token_count,
        tokens_per_second=_finite(message.tokens_per_second),
        kv_cached_tokens=message.kv_cached_token_count,
        prompt_tokens_per_second=_finite(message.prompt_tokens_per_second),
        preemptions=message.preemption_count,
    )


def encode_load(load: Load) -> pb.Load:
    """A runner's load."""
    message = pb.Load(
        models=[encode_model_load(model) for model in load.models],
        memory_available_bytes=load.memory_available_bytes,
        cpu_utilization=load.cpu_utilization,
        gpus=[encode_gpu(gpu) for gpu in load.gpus],
    )
    if load.by_coordinator is not None:
        message.by_coordinator.SetInParent()
        for coordinator, count in load.by_coordinator.items():
            message.by_coordinator.coordinators.add(coordinator=coordinator, request_count=count)
    return message


def decode_load(message: pb.Load) -> Load:
    """A runner's load."""
    return Load(
        models=tuple(decode_model_load(model) for model in message.models),
        memory_available_bytes=message.memory_available_bytes,
        cpu_utilization=_finite(message.cpu_utilization),
        gpus=tuple(decode_gpu(gpu) for gpu in message.gpus),
        by_coordinator=(
            {one.coordinator: one.request_count for one in message.by_coordinator.coordinators}
            if message.HasField("by_coordinator")
            else None
        ),
    )


class ReceivedLoad(Load):
    """A runner's load as it came, for whoever passes more of them on than looks into them.

    It is decoded when somebody first looks, and `message` may go out again as it came: whoever gets it judges it anew.
    """

    __slots__ = ("message",)

    message: pb.Load

    def __init__(self, message: pb.Load) -> None:
        object.__setattr__(self, "message", message)

    def __getattr__(self, name: str) -> Any:
        """Only what isn't set yet is looked for here."""
        if name not in _LOAD_FIELDS:
            raise AttributeError(name)
        decoded = decode_load(self.message)
        for field in _LOAD_FIELDS:
            object.__setattr__(self, field, getattr(decoded, field))
        return getattr(decoded, name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Load):
            return NotImplemented
        return all(getattr(self, field) == getattr(other, field) for field in _LOAD_FIELDS)

    __hash__ = Load.__hash__


_LOAD_FIELDS = frozenset(field.name for field in fields(Load))


def encode_runner_record(
    record: RunnerRecord, *, lease_age_s: float | None = None, lease_expires_in_s: float | None = None
) -> pb.RunnerRecord:
    """A runner as a registry holds it, with the lease's age and what is left of it where they are known."""
    return pb.RunnerRecord(
        runner=encode_runner(record.runner),
        node=encode_node(record.machine),
        state=RUNNER_STATES[record.state],
        load=encode_load(record.load),
        sequence=record.sequence,
        lease_age=None if lease_age_s is None else encode_duration(lease_age_s),
        lease_expires_in=None if lease_expires_in_s is None else encode_duration(lease_expires_in_s),
    )


def decode_runner_record(message: pb.RunnerRecord, runner: Runner | None = None) -> RunnerRecord:
    """A runner as a registry holds it. Node ids of runner and node must agree, and the state must be known.

    `runner` is what its part says, where that was decoded before.
    """
    runner = runner if runner is not None else decode_runner(message.runner)
    node = decode_node(message.node)
    if runner.node_id != node.node_id:
        raise InvalidRequestError("record.runner.node_id", f"is {runner.node_id!r}, but the node is {node.node_id!r}")
    state = decode_runner_state(message.state)
    if state is None:
        raise InvalidRequestError("record.state", "must be starting, ready or draining")
    return RunnerRecord(
        runner=runner, node=node, state=state, load=decode_load(message.load), sequence=message.sequence
    )
