"""Which nodes of a cluster have their runner drained: those that are cordoned, and those that are long not ready.

A DaemonSet's pods stay on a node that is cordoned, drained or lost. A label on the node, its mark, makes the DaemonSet
leave it. Marks are the only memory: whoever starts anew reads them back. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Mark(StrEnum):
    """Why a node's runner is drained; the value of the label."""

    CORDONED = "cordoned"
    NOT_READY = "not-ready"


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A node as the cluster tells it. `mark` is its label as it stands, whatever it says."""

    name: str
    schedulable: bool
    ready: bool
    mark: str | None = None


@dataclass(frozen=True, slots=True)
class MarkChange:
    """A node whose mark is not what it should be; `mark` None takes it off."""

    node: str
    mark: Mark | None


class NodeDrains:
    """The nodes of a cluster, and what should be changed about their marks.

    A cordon counts at once, and so does recovery. Being not ready counts after `not_ready_after_s` without a break: a
    kubelet that restarts does its runner no harm.
    """

    def __init__(self, *, not_ready_after_s: float) -> None:
        self._not_ready_after_s = not_ready_after_s
        self._nodes: dict[str, ClusterNode] = {}
        self._not_ready_since: dict[str, float] = {}

    def replace(self, nodes: list[ClusterNode], now: float) -> None:
        """Takes a whole listing: nodes that are not in it are gone."""
        for name in self._nodes.keys() - {node.name for node in nodes}:
            self.forget(name)
        for node in nodes:
            self.observe(node, now)

    def observe(self, node: ClusterNode, now: float) -> None:
        """A node is like this now."""
        self._nodes[node.name] = node
        if node.ready:
            self._not_ready_since.pop(node.name, None)
        else:
            self._not_ready_since.setdefault(node.name, now)

    def forget(self, name: str) -> None:
        """A node is gone."""
        self._nodes.pop(name, None)
        self._not_ready_since.pop(name, None)

    def changes(self, now: float) -> list[MarkChange]:
        """What is to be changed now, by the nodes' names. A change that was made comes back as an observation."""
        wanted = {name: self._wanted(node, now) for name, node in sorted(self._nodes.items())}
        return [MarkChange(name, mark) for name, mark in wanted.items() if mark != self._nodes[name].mark]

    def next_change_in(self, now: float) -> float | None:
        """Seconds until something may have to be changed though nothing new is heard; None for never."""
        waits = [
            since + self._not_ready_after_s - now
            for name, since in self._not_ready_since.items()
            if self._nodes[name].schedulable and self._nodes[name].mark is None
        ]
        return max(0.0, min(waits)) if waits else None

    def _wanted(self, node: ClusterNode, now: float) -> Mark | None:
        if not node.schedulable:
            return Mark.CORDONED
        if node.ready:
            return None
        overdue = now - self._not_ready_since[node.name] >= self._not_ready_after_s
        # A mark that is there already says that somebody has waited for it, be it a former life of the controller.
        return Mark.NOT_READY if overdue or node.mark is not None else None
