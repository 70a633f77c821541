"""How the word of several registries becomes one directory, rule by rule."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from chorus.core.errors import MalformedMessageError
from chorus.core.fleet.directory import Directory, DirectoryMerger
from chorus.core.fleet.events import (
    BookmarkEvent,
    DeltaEvent,
    LeasedRecord,
    Removal,
    RemovalReason,
    SnapshotEvent,
)
from chorus.core.fleet.records import RunnerRecord
from tests.core.fleet_records import record


def leased(records: Iterable[RunnerRecord]) -> tuple[LeasedRecord, ...]:
    return tuple(LeasedRecord(each) for each in records)


def snapshot(*records: RunnerRecord, epoch: int = 1, revision: int = 1, synced: bool = True) -> SnapshotEvent:
    return SnapshotEvent(epoch, revision, synced, leased(records))


def upsert(*records: RunnerRecord, epoch: int = 1, revision: int = 2, synced: bool = True) -> DeltaEvent:
    return DeltaEvent(epoch, revision, synced, leased(records))


def removal(runner_id: str, incarnation: int = 1, *, epoch: int = 1, synced: bool = True) -> DeltaEvent:
    return DeltaEvent(epoch, 2, synced, (), (Removal(runner_id, incarnation, RemovalReason.EXPIRED),))


def versions(directory: Directory) -> dict[str, tuple[int, int]]:
    return {runner_id: entry.record.version for runner_id, entry in directory.entries.items()}


@pytest.fixture
def merger() -> DirectoryMerger:
    return DirectoryMerger(linger_s=10.0)


def test_one_registry_is_believed(merger: DirectoryMerger) -> None:
    empty = merger.directory
    assert not empty.synced
    first = merger.apply("a", snapshot(record("x"), record("y")), 0.0)
    assert versions(first) == {"x": (1, 1), "y": (1, 1)}
    assert first.synced
    assert first.version > empty.version
    assert merger.apply("a", BookmarkEvent(1, 1, True), 1.0) is first
    second = merger.apply("a", upsert(record("x", 1, 2)), 1.0)
    assert versions(second) == {"x": (1, 2), "y": (1, 1)}
    assert versions(merger.apply("a", removal("y"), 1.0)) == {"x": (1, 2)}
    assert versions(first) == {"x": (1, 1), "y": (1, 1)}, "an old directory stays as it was"


def test_the_greatest_incarnation_and_sequence_counts_whoever_says_it(merger: DirectoryMerger) -> None:
    merger.apply("a", snapshot(record("x", 2, 5)), 0.0)
    assert versions(merger.apply("b", snapshot(record("x", 2, 4)), 0.0)) == {"x": (2, 5)}
    assert versions(merger.apply("b", upsert(record("x", 2, 6)), 0.0)) == {"x": (2, 6)}
    assert versions(merger.apply("b", upsert(record("x", 3, 1)), 0.0)) == {"x": (3, 1)}


def test_a_restarted_registry_loses_nobody(merger: DirectoryMerger) -> None:
    before = merger.apply("a", snapshot(record("x"), record("y")), 0.0)
    merger.registry_lost("a", 1.0)
    restarted = merger.apply("a", snapshot(epoch=2, synced=False), 2.0)
    assert restarted.entries == before.entries
    assert not restarted.synced
    back = merger.apply("a", upsert(record("x", 1, 9), epoch=2, synced=False), 2.5)
    assert versions(back) == {"x": (1, 9), "y": (1, 1)}
    assert versions(merger.apply("a", BookmarkEvent(2, 2, True), 4.0)) == {"x": (1, 9)}, "y had a TTL to come back"


def test_a_runner_that_left_while_the_registry_was_away_goes_with_the_synced_snapshot(merger: DirectoryMerger) -> None:
    merger.apply("a", snapshot(record("x"), record("y")), 0.0)
    merger.registry_lost("a", 1.0)
    assert versions(merger.apply("a", snapshot(record("x"), epoch=2), 9.0)) == {"x": (1, 1)}


def test_a_restarted_registry_can_remove_whom_it_has_heard_of(merger: DirectoryMerger) -> None:
    merger.apply("a", snapshot(record("x", 1), record("y", 2)), 0.0)
    merger.apply("a", snapshot(epoch=2, synced=False), 1.0)
    merger.apply("a", upsert(record("x", 1), record("y", 1), epoch=2, synced=False), 1.0)
    gone = DeltaEvent(2, 3, False, (), tuple(Removal(who, 1, RemovalReason.DEREGISTERED) for who in "xy"))
    assert versions(merger.apply("a", gone, 1.0)) == {"y": (2, 1)}, "the newer y may still be on its way"


def test_without_any_registry_the_last_directory_stays(merger: DirectoryMerger) -> None:
    before = merger.apply("a", snapshot(record("x")), 0.0)
    merger.apply("b", snapshot(record("y")), 0.0)
    merger.registry_lost("a", 1.0)
    after = merger.registry_lost("b", 1.0)
    assert set(after.entries) == {"x", "y"}
    assert after.get("x") is before.get("x")
    assert not after.synced
    # Even the return of one that has yet to hear from anybody changes nothing, however long it takes.
    assert set(merger.apply("a", snapshot(epoch=2, synced=False), 1000.0).entries) == {"x", "y"}


def test_one_registry_cannot_remove_whom_another_holds(merger: DirectoryMerger) -> None:
    merger.apply("a", snapshot(record("x")), 0.0)
    merger.apply("b", snapshot(record("x")), 0.0)
    assert versions(merger.apply("a", removal("x"), 1.0)) == {"x": (1, 1)}
    assert versions(merger.apply("b", removal("x"), 1.1)) == {}


def test_a_removal_counts_against_the_word_of_a_lost_registry(merger: DirectoryMerger) -> None:
    merger.apply("a", snapshot(record("x")), 0.0)
    merger.apply("b", snapshot(record("x")), 0.0)
    merger.registry_lost("a", 0.5)
    assert versions(merger.apply("b", removal("x"), 1.0)) == {}


def test_a_removal_of_an_older_incarnation_leaves_the_newer(merger: DirectoryMerger) -> None:
    merger.apply("a", snapshot(record("x", 2)), 0.0)
    merger.apply("b", snapshot(record("x", 1)), 0.0)
    merger.registry_lost("a", 0.5)
    assert versions(merger.apply("b", removal("x", 1), 1.0)) == {"x": (2, 1)}


def test_the_word_of_a_lost_registry_lapses_once_another_could_have_been_told(merger: DirectoryMerger) -> None:
    merger.apply("a", snapshot(record("x")), 0.0)
    merger.apply("b", snapshot(record("y")), 0.0)
    merger.registry_lost("a", 1.0)
    assert set(merger.apply("b", BookmarkEvent(1, 1, True), 10.9).entries) == {"x", "y"}
    assert set(merger.apply("b", BookmarkEvent(1, 1, True), 11.0).entries) == {"y"}
    assert [view.registry for view in merger.registries()] == ["b"]


def test_the_time_counts_from_when_somebody_synced_could_be_asked(merger: DirectoryMerger) -> None:
    merger.apply("a", snapshot(record("x")), 0.0)
    merger.registry_lost("a", 1.0)
    merger.apply("b", snapshot(synced=False), 50.0)
    assert set(merger.apply("b", BookmarkEvent(1, 1, True), 52.0).entries) == {"x"}
    assert set(merger.apply("b", BookmarkEvent(1, 1, True), 61.9).entries) == {"x"}
    assert set(merger.apply("b", BookmarkEvent(1, 1, True), 62.0).entries) == set()


def test_an_older_incarnation_may_come_back(merger: DirectoryMerger) -> None:
    merger.apply("a", snapshot(record("x", 6)), 0.0)
    assert versions(merger.apply("a", upsert(record("x", 5)), 1.0)) == {"x": (5, 1)}


def test_a_broken_connection_counts_until_the_runner_answers_returns_or_leaves(merger: DirectoryMerger) -> None:
    def reachable() -> bool | None:
        entry = merger.directory.get("x")
        return None if entry is None else entry.reachable

    merger.apply("a", snapshot(record("x", 1)), 0.0)
    merger.mark_unreachable("x", 2, 0.0)
    assert reachable(), "that was another incarnation"
    merger.mark_unreachable("x", 1, 0.0)
    assert reachable() is False
    merger.apply("a", upsert(record("x", 1, 2)), 0.0)
    assert reachable() is False, "that a registry hears it doesn't help us"
    merger.mark_reachable("x", 0.0)
    assert reachable()
    merger.mark_unreachable("x", 1, 0.0)
    merger.apply("a", upsert(record("x", 2, 1)), 0.0)
    assert reachable()
    merger.mark_unreachable("x", 2, 0.0)
    merger.apply("a", removal("x", 2), 0.0)
    merger.apply("a", upsert(record("x", 2, 5)), 0.0)
    assert reachable()
    assert versions(merger.mark_unreachable("nobody", 1, 0.0)) == {"x": (2, 5)}


def test_the_age_of_the_last_sign_of_life_is_by_our_own_clock(merger: DirectoryMerger) -> None:
    told = LeasedRecord(record("x"), lease_age_s=0.4)
    merger.apply("a", SnapshotEvent(1, 1, True, (told,)), 100.0)
    fresher = LeasedRecord(record("x"), lease_age_s=0.1)
    directory = merger.apply("b", SnapshotEvent(1, 1, True, (fresher,)), 100.0)
    (entry,) = directory.leased(101.0)
    assert entry.lease_age_s == pytest.approx(1.1)


def test_a_directory_tells_what_changed_since_an_older_one(merger: DirectoryMerger) -> None:
    older = merger.apply("a", snapshot(record("x"), record("y"), record("z")), 0.0)
    merger.apply("a", upsert(record("x", 1, 2)), 0.0)
    newer = merger.apply("a", removal("y"), 0.0)
    change = newer.changes_since(older)
    assert [entry.record.version for entry in change.upserts] == [(1, 2)]
    assert [gone.runner.runner_id for gone in change.removed] == ["y"]


@pytest.mark.parametrize(
    "event", [BookmarkEvent(2, 9, True), BookmarkEvent(1, 4, True)], ids=["another epoch", "an older revision"]
)
def test_a_stream_that_breaks_its_contract_is_refused(merger: DirectoryMerger, event: BookmarkEvent) -> None:
    merger.apply("a", snapshot(record("x"), revision=5), 0.0)
    with pytest.raises(MalformedMessageError):
        merger.apply("a", event, 0.0)


def test_a_stream_begins_with_a_snapshot(merger: DirectoryMerger) -> None:
    with pytest.raises(MalformedMessageError):
        merger.apply("a", upsert(record("x")), 0.0)
    merger.apply("a", snapshot(), 0.0)
    merger.registry_lost("a", 0.0)
    merger.registry_lost("a", 0.0)
    merger.registry_lost("nobody", 0.0)
    with pytest.raises(MalformedMessageError):
        merger.apply("a", upsert(record("x")), 0.0)


def test_a_coordinator_can_say_how_it_stands_with_each_registry(merger: DirectoryMerger) -> None:
    merger.apply("b", snapshot(epoch=4, revision=3), 0.0)
    merger.apply("a", snapshot(record("x"), synced=False), 0.0)
    merger.registry_lost("b", 2.0)
    assert [
        (view.registry, view.epoch, view.revision, view.synced, view.runner_count, view.lost_at)
        for view in merger.registries()
    ] == [("a", 1, 1, False, 1, None), ("b", 4, 3, True, 0, 2.0)]
