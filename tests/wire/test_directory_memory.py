"""Encoding and decoding watches with a memory of what was told before: the same as without, whatever came before."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.api.registry.v1 import registry_pb2 as pb
from chorus.core.fleet.events import DeltaEvent, DirectoryEvent, LeasedRecord, Removal, RemovalReason, SnapshotEvent
from chorus.core.fleet.leases import LeaseTable
from chorus.core.fleet.records import Gpu, Load, ModelLoad, RunnerRecord, RunnerState
from chorus.wire.directory import DirectoryDecoder, DirectoryEncoder, decode_directory_event, encode_directory_event
from chorus.wire.resources import ReceivedLoad, encode_load
from tests.core.fleet_records import model, node, record

gpus = st.lists(
    st.builds(Gpu, st.integers(0, 2), st.just("u"), st.just("g"), st.just(9), st.integers(0, 9)), max_size=2
)
loads = st.builds(
    Load,
    st.lists(st.builds(ModelLoad, st.just("m.gguf"), st.integers(0, 4), st.just(4), st.integers(0, 9)), max_size=2).map(
        tuple
    ),
    st.integers(0, 99),
    st.just(0.5),
    gpus.map(tuple),
)
records = st.builds(
    lambda name, sequence, load, state, labels, total, own_gpus: record(
        name,
        1,
        sequence,
        machine=node(f"node-of-{name}", memory_total_bytes=total, gpus=tuple(own_gpus)),
        state=state,
        load=load,
        models=(model(),),
        labels=labels,
    ),
    st.sampled_from("ab"),
    st.integers(1, 9),
    loads,
    st.sampled_from(RunnerState),
    st.sampled_from([{}, {"x": "1", "y": "2"}]),
    st.sampled_from([1, 2]),
    gpus,
)
leased = st.builds(LeasedRecord, records, st.just(0.5), st.none() | st.just(1.5))


@st.composite
def streams(draw: st.DrawFn) -> list[DirectoryEvent]:
    """Events in which runners come anew, change by heartbeats as a registry changes them, and go."""
    latest: dict[str, RunnerRecord] = {}
    events: list[DirectoryEvent] = []
    for _ in range(draw(st.integers(1, 6))):
        told = {one.record.runner.runner_id: one for one in draw(st.lists(leased, max_size=2))}
        for name, one in told.items():
            before = latest.get(name)
            if before is not None and draw(st.booleans()):
                load = draw(loads.flatmap(lambda load: st.sampled_from([load, ReceivedLoad(encode_load(load))])))
                beaten = replace(before, load=load, state=one.record.state, sequence=before.sequence + 1)
                told[name] = replace(one, record=draw(st.sampled_from([before, beaten])))
            latest[name] = told[name].record
        gone = draw(st.sets(st.sampled_from("ab"))) - told.keys()
        removals = tuple(Removal(name, 1, RemovalReason.EXPIRED) for name in sorted(gone))
        runners = tuple(told.values())
        events.append(
            draw(st.sampled_from([SnapshotEvent(1, 2, True, runners), DeltaEvent(1, 2, True, runners, removals)]))
        )
    return events


@given(streams())
def test_with_a_memory_it_is_the_same_as_without(events: list[DirectoryEvent]) -> None:
    encoder, decoder = DirectoryEncoder(), DirectoryDecoder()
    for event in events:
        for _ in range(2):  # two watchers
            raw = encoder.encode(event)
            assert pb.DirectoryEvent.FromString(raw) == encode_directory_event(event)
        assert decoder.decode(pb.DirectoryEvent.FromString(raw)) == brought_up_to_date(event)
        assert decode_directory_event(pb.DirectoryEvent.FromString(raw)) == brought_up_to_date(event)


def brought_up_to_date(event: DirectoryEvent) -> DirectoryEvent:
    """With each machine as the last heartbeat has it, which is what watchers are told."""

    def told(runners: tuple[LeasedRecord, ...]) -> tuple[LeasedRecord, ...]:
        return tuple(
            replace(one, record=replace(one.record, node=one.record.machine, load=plain(one.record.load)))
            for one in runners
        )

    match event:
        case SnapshotEvent():
            return replace(event, runners=told(event.runners))
        case DeltaEvent():
            return replace(event, upserts=told(event.upserts))
        case _:
            return event


def plain(load: Load) -> Load:
    return Load(load.models, load.memory_available_bytes, load.cpu_utilization, load.gpus, load.by_coordinator)


@given(loads, loads)
def test_a_received_load_is_what_it_would_be_decoded(load: Load, other: Load) -> None:
    received = ReceivedLoad(encode_load(load))
    assert received == load == received
    assert load == received
    assert (received == other) == (load == other)
    assert received.message == encode_load(load)
    assert repr(plain(received)) == repr(load)
    with pytest.raises(AttributeError):
        received.nothing_of_the_kind  # noqa: B018


def test_what_a_heartbeat_leaves_as_it_is_is_the_same_object() -> None:
    table = LeaseTable(epoch=1, ttl_s=10.0, now=0.0)
    table.register(record("a", models=(model(),)), 0.0)
    watcher = table.watch()
    encoder, decoder = DirectoryEncoder(), DirectoryDecoder()
    runners = []
    for sequence in range(2, 5):
        event = decoder.decode(pb.DirectoryEvent.FromString(encoder.encode(watcher.take(0.0))))
        told = event.runners if isinstance(event, SnapshotEvent) else event.upserts  # type: ignore[union-attr]
        runners.append(told[0].record.runner)
        table.heartbeat("a", 1, sequence, RunnerState.READY, Load(memory_available_bytes=sequence), 0.0)
    assert runners[0] is runners[1] is runners[2]
