"""The controller that drains the runner of a node that is cordoned or not ready: it watches nodes and marks them.

All it may do is read nodes and change their labels. It keeps nothing: the marks are the nodes' own labels, so that
`kubectl get nodes -L chorus.mesh/drain` shows what it did, and a new one goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from chorus.core.cluster.draining import ClusterNode, MarkChange, NodeDrains
from chorus.core.cluster.labels import DRAIN_LABEL, RUNNER_LABEL
from chorus.core.errors import NotFoundError, UnavailableError
from chorus.k8s.cluster import Cluster, ExpiredError, Object
from chorus.telemetry.logs import get_logger

_NODES = "/api/v1/nodes"
_WATCH_S = 300
_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)

_log = get_logger()


class NodeWatcher:
    """Follows the nodes of a cluster for as long as `run` is let. `sleep` takes seconds, `clock` is monotonic."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        not_ready_after_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._cluster = cluster
        self._drains = NodeDrains(not_ready_after_s=not_ready_after_s)
        self._clock = clock
        self._sleep = sleep
        self._version: str | None = None
        """From where a watch goes on; None where the nodes have to be listed first."""

    def run(self) -> None:
        """Goes on for ever; whoever wants it to end raises something in it."""
        failures = 0
        while True:
            try:
                self.step()
                failures = 0
            except UnavailableError as error:
                wait_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                failures += 1
                _log.warning("nodes.unknown", why=error.message, again_in_s=wait_s)
                self._sleep(wait_s)

    def step(self) -> None:
        """Lists the nodes where that is needed, changes what is to be changed, and watches for a while.

        Raises UnavailableError where the API server does not answer, or refuses.
        """
        if self._version is None:
            self._list()
        self._apply()
        wait_s = self._drains.next_change_in(self._clock())
        timeout_s = _WATCH_S if wait_s is None else min(_WATCH_S, max(1, math.ceil(wait_s)))
        try:
            self._follow(timeout_s)
        except ExpiredError as error:
            _log.info("nodes.expired", why=str(error))
            self._version = None

    def _follow(self, timeout_s: int) -> None:
        """Watches until the server ends it, or something is waited for that comes sooner."""
        assert self._version is not None, "listed before"
        for kind, node in self._cluster.watch(_NODES, self._version, timeout_s=timeout_s):
            self._version = node["metadata"]["resourceVersion"]
            if kind == "BOOKMARK":
                continue
            if kind == "DELETED" or not runs_chorus(node):
                self._drains.forget(node["metadata"]["name"])
                continue
            self._drains.observe(read_node(node), self._clock())
            self._apply()
            wait_s = self._drains.next_change_in(self._clock())
            if wait_s is not None and wait_s < timeout_s:
                return

    def _list(self) -> None:
        listing = self._cluster.get(_NODES)
        self._drains.replace([read_node(node) for node in listing["items"] if runs_chorus(node)], self._clock())
        self._version = listing["metadata"]["resourceVersion"]

    def _apply(self) -> None:
        for change in self._drains.changes(self._clock()):
            self._mark(change)

    def _mark(self, change: MarkChange) -> None:
        patch = {"metadata": {"labels": {DRAIN_LABEL: change.mark}}}
        try:
            changed = self._cluster.merge(f"{_NODES}/{change.node}", patch)
        except NotFoundError:
            self._drains.forget(change.node)
            return
        # What the answer says is newer than what the watch will; a watch that tells it again changes nothing.
        self._drains.observe(read_node(changed), self._clock())
        _log.info("node.drained" if change.mark else "node.back", node=change.node, why=change.mark or "ready again")


def runs_chorus(node: Object) -> bool:
    """Whether a node is meant to have a runner."""
    return bool(node["metadata"].get("labels", {}).get(RUNNER_LABEL) == "true")


def read_node(node: Object) -> ClusterNode:
    """Returns what counts of a Node of the API."""
    conditions = {entry["type"]: entry["status"] for entry in node.get("status", {}).get("conditions", [])}
    return ClusterNode(
        name=node["metadata"]["name"],
        schedulable=not node.get("spec", {}).get("unschedulable", False),
        ready=conditions.get("Ready") == "True",
        mark=node["metadata"].get("labels", {}).get(DRAIN_LABEL),
    )
