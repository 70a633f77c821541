"""The rules of leases one by one, then a model-based test of the whole table."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chorus.core.errors import InvalidRequestError, StaleIncarnationError, UnknownLeaseError
from chorus.core.fleet.events import BookmarkEvent, DeltaEvent, Removal, RemovalReason, SnapshotEvent
from chorus.core.fleet.leases import LeaseTable, Watcher
from chorus.core.fleet.records import Load, RunnerRecord, RunnerState
from tests.core.fleet_records import READY, model, node, record

BUSY = Load(memory_available_bytes=1, cpu_utilization=0.5)


def table(now: float = 0.0) -> LeaseTable:
    return LeaseTable(epoch=7, ttl_s=2.0, now=now)


def sweep(leases: LeaseTable, start: float, end: float) -> list[Removal]:
    """Sweeps as a registry does, twenty times a TTL."""
    steps = round((end - start) / 0.1)
    return [removal for step in range(1, steps + 1) for removal in leases.expire(start + step * 0.1)]


def test_a_silent_runner_leaves_after_a_ttl_and_a_heartbeat_keeps_it() -> None:
    leases = table()
    leases.register(record("a"), 0.0)
    leases.register(record("b"), 0.0)
    assert sweep(leases, 0.0, 1.5) == []
    leases.heartbeat("b", 1, 2, READY, BUSY, 1.5)
    assert sweep(leases, 1.5, 3.0) == [Removal("a", 1, RemovalReason.EXPIRED)]
    assert [leased.record.runner.runner_id for leased in leases.leased(3.0)] == ["b"]


def test_a_late_heartbeat_saves_a_lease_until_the_sweep() -> None:
    leases = table()
    sweep(leases, 0.0, 2.0)
    leases.register(record(), 0.0)
    leases.heartbeat("r", 1, 2, READY, BUSY, 2.05)
    assert sweep(leases, 2.0, 2.5) == []


def test_a_lease_tells_its_age_and_what_is_left_of_it() -> None:
    leases = table()
    leases.register(record(), 1.0)
    (leased,) = leases.leased(1.5)
    assert (leased.lease_age_s, leased.lease_expires_in_s) == (0.5, 1.5)


def test_a_newer_incarnation_replaces_at_once_and_the_older_is_refused() -> None:
    leases = table()
    leases.register(record(incarnation=5, sequence=9), 0.0)
    assert leases.register(record(incarnation=6, sequence=1), 0.0)
    with pytest.raises(StaleIncarnationError, match="incarnation 6"):
        leases.register(record(incarnation=5, sequence=10), 0.0)
    with pytest.raises(StaleIncarnationError):
        leases.heartbeat("r", 5, 11, READY, BUSY, 0.0)
    assert leases.deregister("r", 5) is None
    assert leases.leased_record("r", 0.0).record.version == (6, 1)


def test_an_older_incarnation_may_come_back_once_the_newer_is_gone() -> None:
    leases = table()
    leases.register(record(incarnation=6), 0.0)
    assert leases.deregister("r", 6) == Removal("r", 6, RemovalReason.DEREGISTERED)
    assert leases.register(record(incarnation=5), 0.0)


@pytest.mark.parametrize("incarnation", [1, 3])
def test_a_heartbeat_without_a_lease_is_told_to_register(incarnation: int) -> None:
    leases = table()
    if incarnation == 3:  # known, but as an older process
        leases.register(record(incarnation=2), 0.0)
    with pytest.raises(UnknownLeaseError, match="register again"):
        leases.heartbeat("r", incarnation, 1, READY, BUSY, 0.0)


def test_a_sequence_that_is_not_greater_only_renews() -> None:
    leases = table()
    leases.register(record(sequence=5), 0.0)
    revision = leases.revision
    assert not leases.heartbeat("r", 1, 5, RunnerState.DRAINING, BUSY, 1.0)
    assert not leases.register(record(sequence=4, state=RunnerState.STARTING), 1.5)
    assert leases.revision == revision
    (leased,) = leases.leased(1.5)
    assert (leased.record, leased.lease_age_s) == (record(sequence=5), 0.0)


def test_a_heartbeat_brings_what_the_machine_is_like_now() -> None:
    leases = table()
    leases.register(record(machine=node(memory_available_bytes=9)), 0.0)
    leases.heartbeat("r", 1, 2, READY, Load(memory_available_bytes=3), 0.0)
    assert leases.leased_record("r", 0.0).record.machine.memory_available_bytes == 3
    leases.heartbeat("r", 1, 3, READY, Load(), 0.0)
    assert leases.leased_record("r", 0.0).record.machine.memory_available_bytes == 9


def test_an_admin_may_deregister_any_incarnation_and_nobody_is_no_error() -> None:
    leases = table()
    leases.register(record(incarnation=6), 0.0)
    assert leases.deregister("nobody", None) is None
    assert leases.deregister("r", None) == Removal("r", 6, RemovalReason.DEREGISTERED)
    assert len(leases) == 0


@pytest.mark.parametrize(
    "impossible", [record(""), record("x" * 254), record(machine=node("")), record(machine=node("x" * 254))]
)
def test_impossible_ids_are_refused(impossible: RunnerRecord) -> None:
    with pytest.raises(InvalidRequestError):
        table().register(impossible, 0.0)


def test_a_registry_that_stood_still_removes_nobody_for_one_more_ttl() -> None:
    leases = table()
    leases.register(record("alive"), 0.0)
    leases.register(record("dead"), 0.0)
    assert leases.expire(3600.0) == ()
    leases.heartbeat("alive", 1, 2, READY, BUSY, 3601.0)
    assert sweep(leases, 3600.0, 3601.9) == []
    assert sweep(leases, 3601.9, 3602.5) == [Removal("dead", 1, RemovalReason.EXPIRED)]


@pytest.mark.parametrize("apart_s", [0.3, 0.6, 0.99])
def test_a_starved_registry_counts_an_eighth_of_a_ttl_from_one_sweep_to_the_next(apart_s: float) -> None:
    leases, now = table(), 0.0
    leases.register(record("unread"), now)
    for _ in range(7):
        now += apart_s
        assert leases.expire(now) == (), "its heartbeats may lie unread"
        leases.validate_state()
    assert leases.expire(now + apart_s) + leases.expire(now + 2 * apart_s) != (), "but not for ever"


def test_synced_after_a_ttl_in_which_it_did_not_stand_still() -> None:
    leases = table()
    sweep(leases, 0.0, 1.9)
    assert not leases.synced
    leases.expire(60.0)
    sweep(leases, 60.0, 61.9)
    assert not leases.synced
    sweep(leases, 61.9, 62.2)
    assert leases.synced
    leases.expire(3600.0)
    assert leases.synced, "nobody was removed, so whoever is absent was gone before"


def test_a_watch_begins_with_a_snapshot_then_tells_changes_and_bookmarks() -> None:
    leases = table()
    leases.register(record("a"), 0.0)
    watcher = leases.watch()
    assert watcher.pending
    first = watcher.take(0.5)
    assert first == SnapshotEvent(7, 1, False, leases.leased(0.5))
    assert not watcher.pending
    assert watcher.take(0.5) == BookmarkEvent(7, 1, False)
    leases.register(record("b"), 0.5)
    leases.heartbeat("a", 1, 2, READY, BUSY, 0.5)
    leases.heartbeat("a", 1, 3, RunnerState.DRAINING, BUSY, 0.6)
    assert watcher.pending
    assert watcher.take(0.6) == DeltaEvent(
        7, 4, False, (leases.leased_record("b", 0.6), leases.leased_record("a", 0.6))
    )
    leases.deregister("a", 1)
    assert watcher.take(0.6) == DeltaEvent(7, 5, False, (), (Removal("a", 1, RemovalReason.DEREGISTERED),))


def test_a_watcher_is_told_that_the_registry_has_synced() -> None:
    leases = table()
    watcher = leases.watch()
    watcher.take(0.0)
    sweep(leases, 0.0, 2.2)
    assert watcher.pending
    assert watcher.take(2.2) == BookmarkEvent(7, 0, True)
    assert not watcher.pending


def test_who_came_and_went_between_two_takes_is_not_mentioned() -> None:
    leases = table()
    watcher = leases.watch()
    watcher.take(0.0)
    leases.register(record(), 0.0)
    leases.deregister("r", 1)
    assert watcher.take(0.0) == BookmarkEvent(7, 2, False)


def test_a_watch_without_load_hears_of_states_and_models_alone() -> None:
    leases = table()
    leases.register(record(), 0.0)
    watcher = leases.watch(without_load=True)
    watcher.take(0.0)
    leases.heartbeat("r", 1, 2, READY, BUSY, 0.0)
    assert not watcher.pending
    leases.register(record(sequence=3, models=(model(),)), 0.0)
    leases.heartbeat("r", 1, 4, RunnerState.DRAINING, BUSY, 0.0)
    event = watcher.take(0.0)
    assert isinstance(event, DeltaEvent)
    assert [leased.record.version for leased in event.upserts] == [(1, 4)]


def test_a_slow_watcher_holds_one_entry_for_each_runner() -> None:
    leases = table()
    watcher = leases.watch()
    watcher.take(0.0)
    for number in range(1000):
        runner_id = f"r{number % 3}"
        leases.register(record(runner_id, sequence=number), 0.0)
        if number % 5 == 0:
            leases.deregister(runner_id, 1)
    assert len(watcher._changed) <= 3
    leases.validate_state()


def test_an_ended_watch_is_told_no_more() -> None:
    leases = table()
    watcher = leases.watch()
    watcher.take(0.0)
    leases.unwatch(watcher)
    leases.unwatch(watcher)
    leases.register(record(), 0.0)
    assert not watcher.pending


@dataclass
class _Known:
    version: tuple[int, int]
    heard_at: float


RUNNERS = st.sampled_from(["a", "b", "c"])
INCARNATIONS = st.integers(1, 3)
SEQUENCES = st.integers(0, 6)


class LeaseMachine(RuleBasedStateMachine):
    """The table against the plainest reference: a dict, swept ten times a TTL without standstills."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.table = table()
        self.known: dict[str, _Known] = {}
        self.watchers: list[tuple[Watcher, dict[str, tuple[int, int]]]] = []

    @rule(runner_id=RUNNERS, incarnation=INCARNATIONS, sequence=SEQUENCES)
    def register(self, runner_id: str, incarnation: int, sequence: int) -> None:
        known = self.known.get(runner_id)
        if known is not None and incarnation < known.version[0]:
            with pytest.raises(StaleIncarnationError):
                self.table.register(record(runner_id, incarnation, sequence), self.now)
            return
        self.table.register(record(runner_id, incarnation, sequence), self.now)
        version = max((incarnation, sequence), known.version if known else (0, 0))
        self.known[runner_id] = _Known(version, self.now)

    @rule(runner_id=RUNNERS, incarnation=INCARNATIONS, sequence=SEQUENCES, state=st.sampled_from(RunnerState))
    def heartbeat(self, runner_id: str, incarnation: int, sequence: int, state: RunnerState) -> None:
        known = self.known.get(runner_id)
        if known is None or incarnation != known.version[0]:
            refusal = StaleIncarnationError if known and incarnation < known.version[0] else UnknownLeaseError
            with pytest.raises(refusal):
                self.table.heartbeat(runner_id, incarnation, sequence, state, BUSY, self.now)
            return
        self.table.heartbeat(runner_id, incarnation, sequence, state, BUSY, self.now)
        self.known[runner_id] = _Known(max((incarnation, sequence), known.version), self.now)

    @rule(runner_id=RUNNERS, incarnation=st.none() | INCARNATIONS)
    def deregister(self, runner_id: str, incarnation: int | None) -> None:
        known = self.known.get(runner_id)
        goes = known is not None and (incarnation is None or incarnation >= known.version[0])
        assert (self.table.deregister(runner_id, incarnation) is not None) == goes
        if goes:
            del self.known[runner_id]

    @rule(steps=st.integers(1, 12))
    def pass_time(self, steps: int) -> None:
        for _ in range(steps):
            self.now = round(self.now + 0.2, 1)
            removed = {removal.runner_id for removal in self.table.expire(self.now)}
            lapsed = {runner_id for runner_id, known in self.known.items() if self.now - known.heard_at > 2.05}
            surely = {runner_id for runner_id in removed if self.now - self.known[runner_id].heard_at > 1.95}
            assert lapsed <= removed == surely
            for runner_id in removed:
                del self.known[runner_id]

    @rule()
    def watch(self) -> None:
        self.watchers.append((self.table.watch(), {}))

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        """After any take, what the reader has put together is the table."""
        if not self.watchers:
            return
        watcher, seen = data.draw(st.sampled_from(self.watchers))
        event = watcher.take(self.now)
        assert event.revision == self.table.revision
        if isinstance(event, SnapshotEvent):
            assert not seen
            seen.update((leased.record.runner.runner_id, leased.record.version) for leased in event.runners)
        elif isinstance(event, DeltaEvent):
            assert event.upserts or event.removals
            for removal in event.removals:
                assert seen.pop(removal.runner_id)
            seen.update((leased.record.runner.runner_id, leased.record.version) for leased in event.upserts)
        assert seen == {runner_id: known.version for runner_id, known in self.known.items()}
        assert not watcher.pending

    @invariant()
    def agrees(self) -> None:
        self.table.validate_state()
        leased = {entry.record.runner.runner_id: entry for entry in self.table.leased(self.now)}
        assert {runner_id: entry.record.version for runner_id, entry in leased.items()} == {
            runner_id: known.version for runner_id, known in self.known.items()
        }
        for runner_id, entry in leased.items():
            assert entry.lease_age_s == pytest.approx(self.now - self.known[runner_id].heard_at)
        assert self.table.synced == (self.now >= 2.0)


TestLeaseTable = LeaseMachine.TestCase
