"""Whether one runner can serve a request: one check after another, and the first that fails is the reason why not.

Nothing here builds a sentence: a request that finds a runner at once must not pay for explaining the others.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

from chorus.core.costs.purse import Purse, Unpriced
from chorus.core.fleet.directory import DirectoryEntry
from chorus.core.fleet.records import (
    EngineKind,
    ModelLoad,
    ModelState,
    ModelStatus,
    RunnerRecord,
    RunnerState,
)
from chorus.core.placement.needs import Needs, Work

# Models with these tags make vectors or scores; they are never chosen to generate unless they are named.
NOT_GENERATING_TAGS = frozenset({"embedding", "rerank"})
# Requests that may wait at a runner, for each of its slots, before placement calls it full.
QUEUED_PER_SLOT = 16


# Every decision asks for these several times, and a member of an enum takes ten times as long to find as a name.
_LOADED = ModelState.LOADED
_READY = RunnerState.READY
_GENERATE = Work.GENERATE

Seat: TypeAlias = tuple[ModelStatus, ModelLoad | None, int]
"""A model of a runner, the load reported for it (None: not loaded, or no report yet), and how many requests it has."""


class RejectionReason(StrEnum):
    """Why a runner can't serve a request, in the order of the checks: whoever fails a later one came closer."""

    MODEL = "model"
    FEATURE = "feature"
    ADAPTER = "adapter"
    TIER = "tier"
    TAG = "tag"
    PRIVATE = "private"
    UNPRICED = "unpriced"
    CONTEXT = "context"
    LABEL = "label"
    PINNED = "pinned"
    MEMORY = "memory"
    NOT_LOADED = "not_loaded"
    STATE = "state"
    UNREACHABLE = "unreachable"
    BREAKER_OPEN = "breaker_open"
    TRIED = "tried"
    BUDGET = "budget"
    FULL = "full"


CLOSENESS: Mapping[RejectionReason, int] = {reason: position for position, reason in enumerate(RejectionReason)}
"""How many checks a runner passed before it failed this one."""


@dataclass(frozen=True, slots=True)
class Miss:
    """The check that a runner failed, on which of its models, and what was found there (its type: by the reason)."""

    reason: RejectionReason
    model: ModelStatus | None = None
    found: Any = None


@dataclass(frozen=True, slots=True)
class Situation:
    """What a coordinator knows beyond the directory, at one moment; every mapping and set is by runner id.

    `in_flight`: its own requests that a runner's last load report can't know of yet (negative: they ended since).
    `company`: how many times as many requests all coordinators send as this one, at least 1. `tried`: runners that this
    very request was tried on. `penalties`: seconds added to a runner's cost, for its recent failures. `weights`:
    configured, above 0 and at most 1; one of 0.5 makes a runner count as twice as slow. By runner and model (artifact
    name): `barred`, those whose circuit breaker lets no request through; `shared`, about how many tokens of this
    request's prompt are in memory there. `purse`: what paid providers may cost; None: whatever they do.
    """

    in_flight: Mapping[str, int] = field(default_factory=dict)
    company: float = 1.0
    tried: Container[str] = frozenset()
    barred: frozenset[tuple[str, str]] = frozenset()
    penalties: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    shared: Mapping[tuple[str, str], int] = field(default_factory=dict)
    purse: Purse | None = None


NOTHING_MORE = Situation()

# By far the commonest: made once.
_OTHER_MODEL = Miss(RejectionReason.MODEL)


def fit(needs: Needs, entry: DirectoryEntry, situation: Situation) -> list[Seat] | Miss:
    """The models of a runner that can serve the request, at least one; or the check that its closest model failed."""
    record = entry.record
    good: list[ModelStatus] = []
    closest: Miss | None = None
    for status in record.runner.models:
        miss = _miss_of_model(needs, record, status)
        if miss is None:
            good.append(status)
        elif closest is None or CLOSENESS[miss.reason] > CLOSENESS[closest.reason]:
            closest = miss
    if not good:
        if closest is None and record.state is RunnerState.STARTING:
            return Miss(RejectionReason.STATE)  # it has not found its models yet
        return closest or _OTHER_MODEL
    if needs.labels or needs.runner_ids or needs.node_ids:
        early = _miss_of_runner(needs, record)
        if early is not None:
            return early
    usable = [s for s in good if s.state is _LOADED or _miss_of_storage(record, s) is None]
    if not usable:
        return _miss_of_storage(record, good[0]) or Miss(RejectionReason.NOT_LOADED, good[0])
    if record.state is not _READY:
        return Miss(RejectionReason.STATE, usable[0])
    if not entry.reachable:
        return Miss(RejectionReason.UNREACHABLE, usable[0])
    seats: list[Seat] = []
    closest = None
    for status in usable:
        seat = seat_of(record, status, situation)
        miss = _miss_now(needs, record, seat, situation)
        if miss is None:
            seats.append(seat)
        elif closest is None or CLOSENESS[miss.reason] > CLOSENESS[closest.reason]:
            closest = miss
    if closest is not None and not seats:
        return closest
    return seats


def may_fit(needs: Needs, record: RunnerRecord) -> bool:
    """Whether a runner passes every check that depends neither on the moment nor on the prompt's length."""
    return any(_miss_of_model(needs, record, status, context=False) is None for status in record.runner.models) and (
        _miss_of_runner(needs, record) is None
    )


def has_loaded(needs: Needs, record: RunnerRecord) -> bool:
    """Whether a runner has a model in memory with which it passes those checks."""
    return any(
        status.state is _LOADED and _miss_of_model(needs, record, status, context=False) is None
        for status in record.runner.models
    )


def _miss_of_model(needs: Needs, record: RunnerRecord, status: ModelStatus, *, context: bool = True) -> Miss | None:
    """What a model itself lacks."""
    artifact = status.artifact
    model = needs.model
    if model:
        if model != artifact.family and model != artifact.name:
            return _OTHER_MODEL
    elif needs.work is _GENERATE and not NOT_GENERATING_TAGS.isdisjoint(artifact.tags):
        return _OTHER_MODEL
    if not needs.features <= status.features:
        return Miss(RejectionReason.FEATURE, status, needs.features - status.features)
    if needs.adapter and needs.adapter not in status.adapters:
        return Miss(RejectionReason.ADAPTER, status, status.adapters)
    if needs.tier is not None and artifact.tier is not needs.tier:
        return Miss(RejectionReason.TIER, status)
    if needs.tags and not needs.tags.issubset(artifact.tags):
        return Miss(RejectionReason.TAG, status, needs.tags.difference(artifact.tags))
    if needs.private or not needs.allow_external:
        miss = _miss_of_privacy(needs, record, status)
        if miss is not None:
            return miss
    # A context of 0 is one that the engine can't tell.
    if context and needs.context_length > status.context_length > 0:
        return Miss(RejectionReason.CONTEXT, status, status.context_length)
    if needs.artifact_sha256 and needs.artifact_sha256 != artifact.sha256:
        return Miss(RejectionReason.PINNED, status, "artifact")
    return None


def _miss_of_privacy(needs: Needs, record: RunnerRecord, status: ModelStatus) -> Miss | None:
    """Whether this engine may see the prompt. One that the runner does not describe is taken for the worst."""
    if is_external(record, status):
        return Miss(RejectionReason.PRIVATE, status, "external")
    if needs.private and any(e.plaintext for e in record.runner.engines if e.name == status.engine):
        return Miss(RejectionReason.PRIVATE, status, "plaintext")
    return None


def _miss_now(needs: Needs, record: RunnerRecord, seat: Seat, situation: Situation) -> Miss | None:
    """What keeps a model that is there from serving this request at this moment."""
    status, _, busy = seat
    runner_id = record.runner.runner_id
    if situation.barred and (runner_id, status.artifact.name) in situation.barred:
        return Miss(RejectionReason.BREAKER_OPEN, status)
    if runner_id in situation.tried:
        return Miss(RejectionReason.TRIED, status)
    if situation.purse is not None:
        miss = _miss_of_money(needs, record, status, situation.purse)
        if miss is not None:
            return miss
    return Miss(RejectionReason.FULL, status, busy) if is_full(seat) else None


def _miss_of_money(needs: Needs, record: RunnerRecord, status: ModelStatus, purse: Purse) -> Miss | None:
    """Whether a paid provider can be paid for this."""
    if not is_external(record, status):
        return None
    lack = purse.lacks(status.artifact, needs.most_prompt_tokens, needs.answer_tokens)
    if lack is None:
        return None
    return Miss(RejectionReason.UNPRICED if isinstance(lack, Unpriced) else RejectionReason.BUDGET, status, lack)


def is_external(record: RunnerRecord, status: ModelStatus) -> bool:
    """Whether a paid provider has the model. An engine that the runner does not describe is taken for one."""
    engine = next((engine for engine in record.runner.engines if engine.name == status.engine), None)
    return engine is None or engine.kind is EngineKind.EXTERNAL


def _miss_of_runner(needs: Needs, record: RunnerRecord) -> Miss | None:
    """What runner and node lack, whatever the moment."""
    runner, node = record.runner, record.node
    for key, value in needs.labels.items():
        if runner.labels.get(key) != value and node.labels.get(key) != value:
            return Miss(RejectionReason.LABEL, found=key)
    if needs.runner_ids and runner.runner_id not in needs.runner_ids:
        return Miss(RejectionReason.PINNED, found="runner")
    if needs.node_ids and node.node_id not in needs.node_ids:
        return Miss(RejectionReason.PINNED, found="node")
    return None


def _miss_of_storage(record: RunnerRecord, status: ModelStatus) -> Miss | None:
    """Whether the model can be had there at all. Only what can never fit is refused for its memory: llama.cpp maps
    weights, and the runner may unload others. A server's memory is its own, and may be on another machine."""
    if status.state is ModelState.AVAILABLE and _is_local(record, status):
        memory = record.node.memory_total_bytes + sum(gpu.memory_total_bytes for gpu in record.node.gpus if gpu.usable)
        if status.artifact.size_bytes > memory > 0:
            return Miss(RejectionReason.MEMORY, status, memory)
    elif status.state is ModelState.FAILED:
        return Miss(RejectionReason.NOT_LOADED, status, status.error)
    return None


def _is_local(record: RunnerRecord, status: ModelStatus) -> bool:
    """Whether the engine works in the runner's own process."""
    return any(engine.kind is EngineKind.LOCAL and engine.name == status.engine for engine in record.runner.engines)


def load_of(record: RunnerRecord, status: ModelStatus) -> ModelLoad | None:
    """The load that the runner reported for a model; None where it is not loaded or has not reported yet."""
    name = status.artifact.name
    for load in record.load.models:
        if load.model == name:
            return load
    return None


def slots_of(status: ModelStatus, load: ModelLoad | None) -> int:
    """How many requests the runner decodes at once with a model; at least 1."""
    return (load is not None and load.slots_total) or status.slot_count or 1


def seat_of(record: RunnerRecord, status: ModelStatus, situation: Situation) -> Seat:
    """A model's load, and the requests it has now, decoding or waiting: those reported, and ours that are newer.

    What other coordinators have sent since the report is counted by what we have.
    """
    load = load_of(record, status)
    count = situation.in_flight.get(record.runner.runner_id, 0)
    if count > 0:
        count = round(count * situation.company)
    if load is not None:
        count += load.slots_used + load.queued
    return status, load, count if count > 0 else 0


def is_full(seat: Seat) -> bool:
    """Whether so many wait for a model there that the runner would refuse one more, or keep it waiting without end."""
    status, load, busy = seat
    return busy >= slots_of(status, load) * (1 + QUEUED_PER_SLOT)
