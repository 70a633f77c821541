"""Watching and listing the directory: between `chorus.api.registry.v1` and `chorus.core.fleet`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from chorus.api.inference.v1 import generation_pb2
from chorus.api.registry.v1 import registry_pb2 as pb
from chorus.api.runner.v1 import resources_pb2
from chorus.core.errors import InvalidRequestError
from chorus.core.fleet.events import (
    BookmarkEvent,
    DeltaEvent,
    DirectoryEvent,
    LeasedRecord,
    Removal,
    RemovalReason,
    SnapshotEvent,
)
from chorus.core.fleet.listing import NodeEntry, NodeFilter
from chorus.core.fleet.records import Runner, RunnerRecord
from chorus.wire.nesting import nested
from chorus.wire.resources import (
    RUNNER_STATES,
    TIERS,
    ReceivedLoad,
    decode_duration,
    decode_features,
    decode_node,
    decode_runner,
    decode_runner_record,
    decode_runner_state,
    decode_tier,
    encode_features,
    encode_gpu,
    encode_load,
    encode_node,
    encode_runner,
    encode_runner_record,
    set_duration,
)

REMOVAL_REASONS: dict[RemovalReason, pb.RemovalReason.ValueType] = {
    reason: pb.RemovalReason.Value(f"REMOVAL_REASON_{reason.name}") for reason in RemovalReason
}
_REMOVAL_REASONS_BACK = {value: reason for reason, value in REMOVAL_REASONS.items()}


def encode_leased(leased: LeasedRecord) -> resources_pb2.RunnerRecord:
    """A runner with its lease."""
    return encode_runner_record(
        leased.record, lease_age_s=leased.lease_age_s, lease_expires_in_s=leased.lease_expires_in_s
    )


def decode_leased(message: resources_pb2.RunnerRecord, runner: Runner | None = None) -> LeasedRecord:
    """A runner with its lease; `runner` where that was decoded before. Raises as `decode_runner_record`."""
    expires_in = decode_duration(message.lease_expires_in) if message.HasField("lease_expires_in") else None
    return LeasedRecord(decode_runner_record(message, runner), decode_duration(message.lease_age), expires_in)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A runner as it was told last: the parts that heartbeats leave as they are, and all but the lease."""

    record: RunnerRecord
    runner: bytes
    machine: bytes
    whole: bytes


class DirectoryEncoder:
    """Encodes the events of watches, for any number of watchers, as the bytes that go out.

    Of a thousand heartbeats a second nearly all change nothing but the load, and every watcher is told the same. So
    what a runner last looked like is kept, encoded, and only what differs is encoded anew. (As bytes: a message that is
    kept and changed again and again grows, since protobuf frees nothing of it before the whole.)
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Encoded] = {}
        self._lease = resources_pb2.RunnerRecord()  # of numbers alone, which may change as often as they like

    def encode(self, event: DirectoryEvent) -> bytes:
        """A DirectoryEvent."""
        head = pb.DirectoryEvent(epoch=event.epoch, revision=event.revision, synced=event.synced).SerializeToString()
        match event:
            case SnapshotEvent():
                # Who went while nobody watched was told to nobody.
                there = {leased.record.runner.runner_id for leased in event.runners}
                self._kept = {name: known for name, known in self._kept.items() if name in there}
                runners = b"".join(
                    nested(pb.Snapshot.RUNNERS_FIELD_NUMBER, self._leased(leased)) for leased in event.runners
                )
                return head + nested(pb.DirectoryEvent.SNAPSHOT_FIELD_NUMBER, runners)
            case DeltaEvent():
                upserts = [nested(pb.Delta.UPSERTS_FIELD_NUMBER, self._leased(leased)) for leased in event.upserts]
                for removal in event.removals:
                    self._kept.pop(removal.runner_id, None)
                gone = pb.Delta(removals=map(_encode_removal, event.removals)).SerializeToString()
                return head + nested(pb.DirectoryEvent.DELTA_FIELD_NUMBER, b"".join((*upserts, gone)))
            case BookmarkEvent():
                return head + nested(pb.DirectoryEvent.BOOKMARK_FIELD_NUMBER, b"")

    def response(self, event: DirectoryEvent) -> bytes:
        """A WatchNodesResponse, of registries and of coordinators alike."""
        return nested(pb.WatchNodesResponse.EVENT_FIELD_NUMBER, self.encode(event))

    def _leased(self, leased: LeasedRecord) -> bytes:
        """A RunnerRecord."""
        record, lease = leased.record, self._lease
        set_duration(lease.lease_age, leased.lease_age_s)
        if leased.lease_expires_in_s is None:
            lease.ClearField("lease_expires_in")
        else:
            set_duration(lease.lease_expires_in, leased.lease_expires_in_s)
        known = self._kept.get(record.runner.runner_id)
        if known is None or known.record is not record:
            known = self._kept[record.runner.runner_id] = _encode_anew(record, known)
        return known.whole + lease.SerializeToString()


def _encode_anew(record: RunnerRecord, known: _Encoded | None) -> _Encoded:
    """A heartbeat leaves runner and node, as registered, the objects that they were; they are not encoded again."""
    node = record.node
    if known is not None and known.record.runner is record.runner:
        runner = known.runner
    else:
        runner = nested(
            resources_pb2.RunnerRecord.RUNNER_FIELD_NUMBER, encode_runner(record.runner).SerializeToString()
        )
    if known is not None and known.record.node is node:
        machine = known.machine
    else:
        machine = encode_node(replace(node, memory_available_bytes=0, gpus=())).SerializeToString()
    load = record.load.message if isinstance(record.load, ReceivedLoad) else encode_load(record.load)
    # As `RunnerRecord.machine` has it.
    moving = resources_pb2.Node(
        memory_available_bytes=load.memory_available_bytes or node.memory_available_bytes,
        gpus=load.gpus or map(encode_gpu, node.gpus),
    )
    rest = resources_pb2.RunnerRecord(state=RUNNER_STATES[record.state], load=load, sequence=record.sequence)
    told = nested(resources_pb2.RunnerRecord.NODE_FIELD_NUMBER, machine + moving.SerializeToString())
    return _Encoded(record, runner, machine, runner + told + rest.SerializeToString())


def encode_directory_event(event: DirectoryEvent) -> pb.DirectoryEvent:
    """One event of a watched directory, when there is no other."""
    return pb.DirectoryEvent.FromString(DirectoryEncoder().encode(event))


class DirectoryDecoder:
    """Decodes the events of watches of any number of registries.

    A runner that is told again as it was, but for its load, is the same object as before: it is not decoded anew, and
    whoever compares two directories need not look into it.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[bytes, Runner]] = {}

    def decode(self, message: pb.DirectoryEvent) -> DirectoryEvent:
        """One event of a watched directory; one of a newer version counts as a bookmark."""
        epoch, revision, synced = message.epoch, message.revision, message.synced
        match message.WhichOneof("event"):
            case "snapshot":
                runners = tuple(self._leased(record) for record in message.snapshot.runners)
                # Who went while nobody watched was told to nobody.
                there = {leased.record.runner.runner_id for leased in runners}
                self._kept = {name: known for name, known in self._kept.items() if name in there}
                return SnapshotEvent(epoch, revision, synced, runners)
            case "delta":
                upserts = tuple(self._leased(record) for record in message.delta.upserts)
                removals = tuple(_decode_removal(removal) for removal in message.delta.removals)
                for removal in removals:
                    self._kept.pop(removal.runner_id, None)
                return DeltaEvent(epoch, revision, synced, upserts, removals)
            case _:
                return BookmarkEvent(epoch, revision, synced)

    def _leased(self, message: resources_pb2.RunnerRecord) -> LeasedRecord:
        return decode_leased(message, self._runner(message.runner))

    def _runner(self, message: resources_pb2.Runner) -> Runner:
        raw = message.SerializeToString(deterministic=True)
        known = self._kept.get(message.runner_id)
        if known is None or known[0] != raw:
            known = self._kept[message.runner_id] = (raw, decode_runner(message))
        return known[1]


def decode_directory_event(message: pb.DirectoryEvent) -> DirectoryEvent:
    """One event of a watched directory, when there is no other."""
    return DirectoryDecoder().decode(message)


def _encode_removal(removal: Removal) -> pb.Removal:
    return pb.Removal(
        runner_id=removal.runner_id, incarnation=removal.incarnation, reason=REMOVAL_REASONS[removal.reason]
    )


def _decode_removal(message: pb.Removal) -> Removal:
    reason = _REMOVAL_REASONS_BACK.get(message.reason, RemovalReason.EXPIRED)
    return Removal(message.runner_id, message.incarnation, reason)


def encode_filter(condition: NodeFilter) -> pb.NodeFilter:
    """Conditions on a node's runners."""
    return pb.NodeFilter(
        model=condition.model,
        labels=condition.labels,
        state=RUNNER_STATES[condition.state] if condition.state else resources_pb2.RUNNER_STATE_UNSPECIFIED,
        features=encode_features(condition.features),
        tier=TIERS[condition.tier] if condition.tier else generation_pb2.TIER_UNSPECIFIED,
        node_id=condition.node_id,
    )


def decode_filter(message: pb.NodeFilter) -> NodeFilter:
    """Conditions on a node's runners. Raises `InvalidRequestError` for one that this version does not know: ignoring it
    would list too many."""
    features = decode_features(message.features)
    if len(features) != len(set(message.features)):
        raise InvalidRequestError("filter.features", "holds one that this version does not know")
    state, tier = decode_runner_state(message.state), decode_tier(message.tier)
    if message.state and state is None:
        raise InvalidRequestError("filter.state", f"{message.state} is not a state that this version knows")
    if message.tier and tier is None:
        raise InvalidRequestError("filter.tier", f"{message.tier} is not a tier that this version knows")
    return NodeFilter(
        model=message.model,
        labels=dict(message.labels),
        state=state,
        features=features,
        tier=tier,
        node_id=message.node_id,
    )


def encode_node_entry(entry: NodeEntry) -> pb.NodeEntry:
    """A machine and its runners."""
    return pb.NodeEntry(node=encode_node(entry.node), runners=[encode_leased(leased) for leased in entry.runners])


def decode_node_entry(message: pb.NodeEntry) -> NodeEntry:
    """A machine and its runners."""
    return NodeEntry(decode_node(message.node), tuple(decode_leased(leased) for leased in message.runners))
