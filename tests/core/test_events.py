"""The event log against a plain list, its readers against what they must be told, and the fleet's events."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from chorus.core.events import (
    Batch,
    Bookmark,
    Cursor,
    Event,
    EventFilter,
    EventKind,
    EventLog,
    EventReader,
    FleetEvents,
    Lost,
    LostReason,
    Subject,
)
from chorus.core.events.log import BATCH_MAX
from chorus.core.fleet.directory import DirectoryChange, DirectoryEntry
from chorus.core.fleet.records import RunnerState
from tests.core.fleet_records import node, record

ANN, BEN = "spiffe://mesh/client/ann", "spiffe://mesh/client/ben"
CAPACITY = 7


@dataclass
class Reading:
    """A reader, and the sequences that it should and did get."""

    reader: EventReader
    condition: EventFilter
    next: int
    told: list[int] = field(default_factory=list)
    missed: int = 0


class LogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.log = EventLog(1, capacity=CAPACITY)
        self.events: list[Event] = []
        self.readings: list[Reading] = []

    @rule(
        kind=st.sampled_from(EventKind),
        caller=st.sampled_from(["", ANN, BEN]),
        model=st.sampled_from("xy"),
        times=st.integers(1, 10),
    )
    def happen(self, kind: EventKind, caller: str, model: str, times: int) -> None:
        for _ in range(times):
            at = float(len(self.events))
            self.events.append(self.log.append(at, kind, Subject(caller=caller, model=model)))

    @rule(
        kinds=st.frozensets(st.sampled_from(EventKind), max_size=3),
        caller=st.sampled_from(["", "ann"]),
        reader=st.sampled_from(["", BEN]),
        back=st.integers(0, 12),
        how=st.sampled_from(["after", "since", "now"]),
    )
    def begin(self, kinds: frozenset[EventKind], caller: str, reader: str, back: int, how: str) -> None:
        condition = EventFilter(kinds=kinds, caller=caller, reader=reader)
        last = len(self.events)
        sequence = max(0, last - back)
        if how == "after":
            self.readings.append(
                Reading(EventReader(self.log, condition, after=Cursor(1, sequence)), condition, sequence + 1)
            )
        elif how == "since":  # event n happened at n - 1
            kept = max(sequence + 1, last - CAPACITY + 1)
            self.readings.append(Reading(EventReader(self.log, condition, since=float(sequence)), condition, kept))
        else:
            self.readings.append(Reading(EventReader(self.log, condition), condition, last + 1))

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        if not self.readings:
            return
        reading = data.draw(st.sampled_from(self.readings))
        pending, missing = reading.reader.pending, reading.reader.misses_some
        told = reading.reader.take()
        oldest = max(1, len(self.events) - CAPACITY + 1)
        assert missing == (reading.next < oldest) == isinstance(told, Lost)
        assert pending == (reading.next <= len(self.events))
        if isinstance(told, Lost):
            assert (told.reason, told.count) == (LostReason.LAGGED, oldest - reading.next)
            assert told.cursor == Cursor(1, oldest - 1)
            reading.next = oldest
            return
        wanted = tuple(event for event in self.events[reading.next - 1 :] if reading.condition.matches(event))
        assert (told.events if isinstance(told, Batch) else ()) == wanted
        assert isinstance(told, Batch) == bool(wanted)
        reading.next = len(self.events) + 1
        assert told.cursor == reading.reader.cursor == Cursor(1, len(self.events))

    @invariant()
    def what_is_kept_is_the_end(self) -> None:
        kept = [self.log.get(sequence) for sequence in range(self.log.oldest, self.log.last + 1)]
        assert kept == self.events[-CAPACITY:]


TestLog = LogMachine.TestCase


@pytest.mark.parametrize("cursor", [Cursor(2, 0), Cursor(2, 3), Cursor(1, 4)], ids=str)
def test_a_cursor_of_another_log_is_told_so_and_reads_all_that_there_is(cursor: Cursor) -> None:
    log = EventLog(1, capacity=2)
    events = [log.append(0.0, EventKind.NODE_JOINED, Subject(node_id=name)) for name in "abc"]
    reader = EventReader(log, after=cursor)
    assert reader.pending
    assert reader.take() == Lost(Cursor(1, 1), LostReason.OTHER_EPOCH, 0)
    assert reader.take() == Batch(Cursor(1, 3), tuple(events[1:]))
    assert reader.take() == Bookmark(Cursor(1, 3))
    assert not reader.pending


def test_much_is_read_in_pieces() -> None:
    log = EventLog(1)
    for _ in range(BATCH_MAX + 1):
        log.append(0.0, EventKind.NODE_JOINED, Subject())
    reader = EventReader(log, after=Cursor(1, 0))
    sizes = []
    while reader.pending:
        told = reader.take()
        assert isinstance(told, Batch)
        sizes.append(len(told.events))
    assert sizes == [BATCH_MAX, 1]


@pytest.mark.parametrize(
    ("condition", "matches"),
    [
        (EventFilter(), True),
        (EventFilter(request_id="r1"), True),
        (EventFilter(request_id="r2"), False),
        (EventFilter(model="family"), True),
        (EventFilter(model="file.gguf"), True),
        (EventFilter(model="fam"), False),
        (EventFilter(caller=ANN), True),
        (EventFilter(caller="ann"), True),
        (EventFilter(caller="nn"), False),
        (EventFilter(caller="ben"), False),
        (EventFilter(reader=ANN), True),
        (EventFilter(reader=BEN), False),
        (EventFilter(reader=ANN, caller="ben"), False),
        (EventFilter(kinds=frozenset({EventKind.REQUEST_FINISHED})), True),
        (EventFilter(kinds=frozenset({EventKind.NODE_LOST})), False),
    ],
    ids=str,
)
def test_a_filter(condition: EventFilter, matches: bool) -> None:
    subject = Subject("r1", ANN, "family", "file.gguf")
    assert condition.matches(Event(1, 0.0, EventKind.REQUEST_FINISHED, subject)) is matches


def test_what_happens_to_the_mesh_is_everybodys_business() -> None:
    for kind in EventKind:
        mine = EventFilter(reader=ANN).matches(Event(1, 0.0, kind, Subject(caller=ANN)))
        theirs = EventFilter(reader=ANN).matches(Event(1, 0.0, kind, Subject(caller=BEN)))
        assert mine
        assert theirs == (kind.partition("_")[0] in ("node", "runner", "breaker", "load"))


# --- the fleet ------------------------------------------------------------------------------------------------------

Mesh = dict[str, DirectoryEntry]
runners = st.dictionaries(
    st.sampled_from("abc"),
    st.builds(
        lambda incarnation, sequence, state, reachable: (incarnation, sequence, state, reachable),
        st.integers(1, 2),
        st.integers(1, 3),
        st.sampled_from(RunnerState),
        st.booleans(),
    ),
)


def mesh_of(described: dict[str, tuple[int, int, RunnerState, bool]]) -> Mesh:
    return {
        name: DirectoryEntry(
            # A process stays on its machine; the next one of the same runner may be elsewhere.
            record(name, incarnation, sequence, machine=node("mn"[(ord(name) + incarnation) % 2]), state=state),
            0.0,
            reachable=reachable,
        )
        for name, (incarnation, sequence, state, reachable) in described.items()
    }


@given(st.lists(runners, max_size=6))
def test_the_fleets_events_say_what_differs_between_two_directories(steps: list[dict[str, object]]) -> None:
    fleet = FleetEvents()
    before: Mesh = {}
    for described in steps:
        after = mesh_of(described)  # type: ignore[arg-type]
        change = DirectoryChange(
            tuple(after.values()), tuple(entry.record for name, entry in before.items() if name not in after)
        )
        happened = fleet.follow(change)
        fleet.validate_state()
        assert fleet.follow(DirectoryChange(tuple(after.values()), ())) == [], "nothing happens twice"
        nodes_before = {entry.record.node.node_id for entry in before.values()}
        nodes_after = {entry.record.node.node_id for entry in after.values()}
        kinds = [(kind, subject.runner_id or subject.node_id) for kind, subject, _ in happened]
        assert len(set(kinds)) == len(kinds) or nodes_before & nodes_after, "each once, unless a node came back"
        for node_id in nodes_after - nodes_before:
            assert (EventKind.NODE_JOINED, node_id) in kinds
        for node_id in nodes_before - nodes_after:
            assert (EventKind.NODE_LOST, node_id) in kinds
        for name in before.keys() | after.keys():
            assert {kind for kind, whom in kinds if whom == name} == expected(before.get(name), after.get(name))
        before = after


def expected(old: DirectoryEntry | None, new: DirectoryEntry | None) -> set[EventKind]:
    """What is to be told of one runner."""
    if new is None:
        return {EventKind.RUNNER_LOST} if old is not None else set()
    told = set()
    is_new = old is None or old.record.runner.incarnation != new.record.runner.incarnation
    if is_new:
        told.add(EventKind.RUNNER_JOINED)
    drained = not is_new and old is not None and old.record.state is RunnerState.DRAINING
    if new.record.state is RunnerState.DRAINING and not drained:
        told.add(EventKind.RUNNER_DRAINING)
    was_reachable = old is None or old.reachable
    if was_reachable and not new.reachable:
        told.add(EventKind.RUNNER_UNREACHABLE)
    if not was_reachable and new.reachable:
        told.add(EventKind.RUNNER_REACHABLE)
    return told
