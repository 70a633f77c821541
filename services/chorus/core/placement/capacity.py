"""How much of a model the mesh can run at once, for admission: what it has for those that could run it, and how busy
they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import ModelState, ModelStatus, RunnerState
from chorus.core.placement.cost import BUSY_SHARE
from chorus.core.placement.fit import load_of, slots_of


def slots_for(model: str, pool: Iterable[str], directory: Directory) -> int:
    """Requests that the runners of `pool` decode at once with a model, a family or an artifact; 0 where none is there.

    A runner that has several artifacts of a family runs one of them: the one with the most slots counts.
    """
    found: dict[str, int] = {}
    for entry, status in _serving(model, pool, directory):
        runner_id = entry.record.runner.runner_id
        found[runner_id] = max(found.get(runner_id, 0), slots_of(status, load_of(entry.record, status)))
    return sum(found.values())


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """How busy a node was by its runners' last reports: requests decoding or waiting there, for whatever model."""

    busy: int
    slots: int
    runner_ids: tuple[str, ...]

    @property
    def share(self) -> float:
        """What share of its slots is taken; over 1 where requests wait."""
        return self.busy / self.slots


def node_loads(model: str, pool: Iterable[str], directory: Directory) -> tuple[NodeLoad, ...]:
    """The nodes that serve a model, the least busy first."""
    nodes: dict[str, NodeLoad] = {}
    seen: set[str] = set()
    for entry, status in _serving(model, pool, directory):
        record = entry.record
        runner_id, node_id = record.runner.runner_id, record.node.node_id
        if runner_id in seen:
            continue
        seen.add(runner_id)
        busy = sum(load.slots_used + load.queued for load in record.load.models)
        slots = slots_of(status, load_of(record, status))
        before = nodes.get(node_id, NodeLoad(0, 0, ()))
        nodes[node_id] = NodeLoad(before.busy + busy, before.slots + slots, (*before.runner_ids, runner_id))
    return tuple(sorted(nodes.values(), key=lambda node: node.share))


def has_quiet_node(loads: Sequence[NodeLoad], in_flight: Mapping[str, int]) -> bool:
    """Whether some node is no more than 80% busy, with what its runners have not reported yet (see Situation)."""
    return any(
        node.busy + sum(in_flight.get(runner_id, 0) for runner_id in node.runner_ids) < BUSY_SHARE * node.slots
        for node in loads
    )


def _serving(model: str, pool: Iterable[str], directory: Directory) -> Iterator[tuple[DirectoryEntry, ModelStatus]]:
    for runner_id in pool:
        entry = directory.get(runner_id)
        if entry is None or not entry.reachable or entry.record.state is not RunnerState.READY:
            continue
        for status in entry.record.runner.models:
            if model in (status.artifact.family, status.artifact.name) and status.state is not ModelState.FAILED:
                yield entry, status
