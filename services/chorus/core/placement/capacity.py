"""How much of a model the mesh can run at once, for admission: what it has for those that could run it, and how busy
they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import ModelState, ModelStatus, RunnerState
from chorus.core.placement.cost import BUSY_SHARE
from chorus.core.placement.fit import Situation, demand, load_of, slots_of


def slots_for(model: str, pool: Iterable[str], directory: Directory) -> int:
    """Requests that the runners of `pool` decode at once with a model, a family or an artifact; 0 where none is there.

    A runner that has several artifacts of a family runs one of them: the one with the most slots counts.
    """
    found: dict[str, int] = {}
    for entry, status in _serving(model, pool, directory):
        runner_id = entry.record.runner.runner_id
        found[runner_id] = max(found.get(runner_id, 0), slots_of(status, load_of(entry.record, status)))
    return sum(found.values())


def has_quiet_node(model: str, pool: Iterable[str], directory: Directory, situation: Situation) -> bool:
    """Whether some node that serves a model is no more than 80% busy, whatever its runners are busy with."""
    busy: dict[str, int] = {}
    slots: dict[str, int] = {}
    for entry, status in _serving(model, pool, directory):
        node_id = entry.record.node.node_id
        others = [load for load in entry.record.load.models if load.model != status.artifact.name]
        used = demand(entry.record, status, situation) + sum(load.slots_used + load.queued for load in others)
        busy[node_id] = busy.get(node_id, 0) + used
        slots[node_id] = slots.get(node_id, 0) + slots_of(status, load_of(entry.record, status))
    return any(busy[node_id] < BUSY_SHARE * slots[node_id] for node_id in busy)


def _serving(model: str, pool: Iterable[str], directory: Directory) -> Iterator[tuple[DirectoryEntry, ModelStatus]]:
    for runner_id in pool:
        entry = directory.get(runner_id)
        if entry is None or not entry.reachable or entry.record.state is not RunnerState.READY:
            continue
        for status in entry.record.runner.models:
            if model in (status.artifact.family, status.artifact.name) and status.state is not ModelState.FAILED:
                yield entry, status
