"""What a change of the directory means: who came, went, drains, or can't be reached. Sans I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from chorus.core.events.records import Detail, EventKind, RunnerJoined, RunnerLost, Subject
from chorus.core.fleet.directory import DirectoryChange, DirectoryEntry
from chorus.core.fleet.records import RunnerState

Happening: TypeAlias = tuple[EventKind, Subject, Detail | None]


@dataclass(frozen=True, slots=True)
class _Seen:
    """A runner as it was last told of."""

    incarnation: int
    node_id: str
    drains: bool
    reachable: bool


class FleetEvents:
    """Remembers who is there, so that only what is new is told: a runner's load changes with every heartbeat."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._runners_of: Counter[str] = Counter()

    def follow(self, change: DirectoryChange) -> list[Happening]:
        """What happened, of nodes and runners; a node joins before its first runner and is lost after its last."""
        told: list[Happening] = []
        for entry in change.upserts:
            told.extend(self._upserted(entry))
        for record in change.removed:
            told.extend(self._removed(record.runner.runner_id))
        return told

    def _upserted(self, entry: DirectoryEntry) -> Iterator[Happening]:
        record, runner = entry.record, entry.record.runner
        before = self._seen.get(runner.runner_id)
        # The usual case, once for every heartbeat in the mesh: nothing to tell.
        drains = record.state is RunnerState.DRAINING
        if (
            before is not None
            and before.incarnation == runner.incarnation
            and before.drains is drains
            and before.reachable is entry.reachable
        ):
            return
        node_id = record.node.node_id
        self._seen[runner.runner_id] = _Seen(runner.incarnation, node_id, drains, entry.reachable)
        subject = Subject(runner_id=runner.runner_id, node_id=node_id)
        is_new = before is None or before.incarnation != runner.incarnation
        if is_new:
            yield from self._moved(before.node_id if before is not None else "", node_id)
            joined = RunnerJoined(runner.incarnation, runner.address, replaced=before is not None)
            yield EventKind.RUNNER_JOINED, subject, joined
        if drains and (is_new or before is None or not before.drains):
            yield EventKind.RUNNER_DRAINING, subject, None
        if not entry.reachable and (before is None or before.reachable):
            yield EventKind.RUNNER_UNREACHABLE, subject, None
        elif entry.reachable and before is not None and not before.reachable:
            yield EventKind.RUNNER_REACHABLE, subject, None

    def _removed(self, runner_id: str) -> Iterator[Happening]:
        before = self._seen.pop(runner_id, None)
        if before is None:
            return
        yield (
            EventKind.RUNNER_LOST,
            Subject(runner_id=runner_id, node_id=before.node_id),
            RunnerLost(before.incarnation),
        )
        yield from self._moved(before.node_id, "")

    def _moved(self, old: str, new: str) -> Iterator[Happening]:
        """A runner is on another node than before; empty: on none."""
        if old == new:
            return
        if new:
            self._runners_of[new] += 1
            if self._runners_of[new] == 1:
                yield EventKind.NODE_JOINED, Subject(node_id=new), None
        if old:
            self._runners_of[old] -= 1
            if not self._runners_of[old]:
                del self._runners_of[old]
                yield EventKind.NODE_LOST, Subject(node_id=old), None

    def validate_state(self) -> None:
        """Raises AssertionError where the counts are not what is there."""
        assert self._runners_of == Counter(seen.node_id for seen in self._seen.values())
