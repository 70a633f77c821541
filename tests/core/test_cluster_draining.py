"""Which nodes are marked: beside a reference that remembers every observation."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from chorus.core.cluster.draining import ClusterNode, Mark, MarkChange, NodeDrains

AFTER_S = 30.0
NAMES = st.sampled_from(["desktop", "laptop", "attic"])


class Cluster(RuleBasedStateMachine):
    """A cluster whose marks are set as the decision says, or not yet, and whose controller is started anew at times."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.nodes: dict[str, ClusterNode] = {}
        self.heard: dict[str, list[tuple[float, bool]]] = {}  # when each was observed, and whether it was ready
        self.drains = NodeDrains(not_ready_after_s=AFTER_S)

    def hear(self, node: ClusterNode) -> None:
        self.nodes[node.name] = node
        self.heard.setdefault(node.name, []).append((self.now, node.ready))

    @rule(name=NAMES, schedulable=st.booleans(), ready=st.booleans())
    def changes(self, name: str, schedulable: bool, ready: bool) -> None:
        mark = self.nodes[name].mark if name in self.nodes else None
        node = ClusterNode(name, schedulable, ready, mark)
        self.hear(node)
        self.drains.observe(node, self.now)

    @rule(seconds=st.sampled_from([1.0, 15.0, 29.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=NAMES)
    def leaves(self, name: str) -> None:
        self.nodes.pop(name, None)
        self.heard.pop(name, None)
        self.drains.forget(name)

    @rule()
    def marks_are_set(self) -> None:
        for change in self.drains.changes(self.now):
            old = self.nodes[change.node]
            node = ClusterNode(old.name, old.schedulable, old.ready, change.mark)
            self.hear(node)
            self.drains.observe(node, self.now)
        assert self.drains.changes(self.now) == []

    @rule()
    def another_controller_takes_over(self) -> None:
        self.drains = NodeDrains(not_ready_after_s=AFTER_S)
        self.heard = {name: [(self.now, node.ready)] for name, node in self.nodes.items()}
        self.drains.replace(list(self.nodes.values()), self.now)

    @invariant()
    def says_what_the_reference_says(self) -> None:
        expected = []
        for name, node in sorted(self.nodes.items()):
            mark = self.reference(name)
            if mark != node.mark:
                expected.append(MarkChange(name, mark))
        assert self.drains.changes(self.now) == expected

    @invariant()
    def wakes_when_something_would_change_by_itself(self) -> None:
        wait_s = self.drains.next_change_in(self.now)
        before = self.drains.changes(self.now)
        if wait_s is None:
            assert self.drains.changes(self.now + 1000) == before
        elif wait_s > 0:
            assert self.drains.changes(self.now + wait_s * 0.9) == before
            assert self.drains.changes(self.now + wait_s + 0.001) != before

    def reference(self, name: str) -> Mark | None:
        node = self.nodes[name]
        if not node.schedulable:
            return Mark.CORDONED
        if node.ready:
            return None
        since = self.now
        for at, ready in reversed(self.heard[name]):
            if ready:
                break
            since = at
        return Mark.NOT_READY if node.mark is not None or self.now - since >= AFTER_S else None


Cluster.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestCluster = Cluster.TestCase


def test_a_cordon_counts_at_once_and_a_restarting_kubelet_does_not():
    drains = NodeDrains(not_ready_after_s=AFTER_S)
    drains.observe(ClusterNode("desktop", schedulable=False, ready=True), 0)
    drains.observe(ClusterNode("laptop", schedulable=True, ready=False), 0)
    assert drains.changes(0) == [MarkChange("desktop", Mark.CORDONED)]
    assert drains.next_change_in(10) == 20
    drains.observe(ClusterNode("laptop", schedulable=True, ready=True), 20)
    assert drains.next_change_in(20) is None
    assert drains.changes(60) == [MarkChange("desktop", Mark.CORDONED)]


def test_a_mark_that_nobody_here_would_set_is_put_right():
    drains = NodeDrains(not_ready_after_s=AFTER_S)
    drains.observe(ClusterNode("desktop", schedulable=True, ready=True, mark="by-hand"), 0)
    assert drains.changes(0) == [MarkChange("desktop", None)]
