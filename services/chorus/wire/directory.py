"""Watching and listing the directory: between `chorus.api.registry.v1` and `chorus.core.fleet`."""

from __future__ import annotations

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
from chorus.wire.resources import (
    RUNNER_STATES,
    TIERS,
    decode_duration,
    decode_features,
    decode_node,
    decode_runner_record,
    decode_runner_state,
    decode_tier,
    encode_features,
    encode_node,
    encode_runner_record,
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


def decode_leased(message: resources_pb2.RunnerRecord) -> LeasedRecord:
    """A runner with its lease. Raises `InvalidRequestError` as `decode_runner_record`."""
    expires_in = decode_duration(message.lease_expires_in) if message.HasField("lease_expires_in") else None
    return LeasedRecord(decode_runner_record(message), decode_duration(message.lease_age), expires_in)


def encode_directory_event(event: DirectoryEvent) -> pb.DirectoryEvent:
    """One event of a watched directory."""
    message = pb.DirectoryEvent(epoch=event.epoch, revision=event.revision, synced=event.synced)
    match event:
        case SnapshotEvent():
            message.snapshot.SetInParent()
            message.snapshot.runners.extend(encode_leased(leased) for leased in event.runners)
        case DeltaEvent():
            message.delta.SetInParent()
            message.delta.upserts.extend(encode_leased(leased) for leased in event.upserts)
            message.delta.removals.extend(_encode_removal(removal) for removal in event.removals)
        case BookmarkEvent():
            message.bookmark.SetInParent()
    return message


def decode_directory_event(message: pb.DirectoryEvent) -> DirectoryEvent:
    """One event of a watched directory; one of a newer version counts as a bookmark."""
    epoch, revision, synced = message.epoch, message.revision, message.synced
    match message.WhichOneof("event"):
        case "snapshot":
            runners = tuple(decode_leased(record) for record in message.snapshot.runners)
            return SnapshotEvent(epoch, revision, synced, runners)
        case "delta":
            upserts = tuple(decode_leased(record) for record in message.delta.upserts)
            removals = tuple(_decode_removal(removal) for removal in message.delta.removals)
            return DeltaEvent(epoch, revision, synced, upserts, removals)
        case _:
            return BookmarkEvent(epoch, revision, synced)


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
