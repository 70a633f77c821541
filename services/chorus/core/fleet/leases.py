"""A registry's leases: who lives, and what to tell those who watch. Sans I/O; `now` is monotonic, in seconds.

Rules:

- The greatest incarnation of a runner holds its one lease, and replaces an older one at once; an older one is refused.
  Once the newer lease is gone an older incarnation may come back: a machine whose clock was put back isn't locked out.
- A message with a sequence that is not greater than the last one only renews: it came late or twice.
- A lease lapses when `expire` finds it silent for longer than the TTL; until that sweep a late heartbeat saves it.
- Time in which the registry itself stood still (a suspended laptop, a starved process) doesn't count against anybody:
  heartbeats were sent, nobody read them. Where two sweeps lie more than half a TTL apart, every lease gets one fresh
  TTL instead, so that the dead are found one TTL late rather than all the living lost. Where they lie less far apart,
  and more than an eighth of a TTL, every lease is longer by what is beyond that.
- `synced` once the table has watched for one whole TTL without such a standstill: by then every living runner had the
  time to come back, and who isn't here is gone.
- A runner is on the node that it states as far as `claims` believes it. A lease for a node that somebody else turns out
  to have a certificate for is worth nothing any more, and gone with the next sweep. Who proved to be where, and where
  the others were, is remembered beyond their leases, for as long as the table lives.
- Every change, of load too, raises the revision by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from chorus.core.errors import InvalidRequestError, StaleIncarnationError, UnknownLeaseError
from chorus.core.fleet.claims import Claim, NodeClaims, check_claim
from chorus.core.fleet.events import (
    BookmarkEvent,
    DeltaEvent,
    LeasedRecord,
    Removal,
    RemovalReason,
    SnapshotEvent,
)
from chorus.core.fleet.records import Load, RunnerRecord, RunnerState

_REMEMBERED_MAX = 10_000
"""So many runners and nodes; those that came longest ago are forgotten first."""


@dataclass(slots=True)
class _Lease:
    record: RunnerRecord
    heard_at: float  # when the runner last gave a sign of life
    lapses_at: float  # heard_at + TTL, or later after a standstill
    claim: Claim
    disproved: bool = False


class Watcher:
    """One watch of a table: a snapshot, then what changed, each runner at most once between two takes.

    It never holds more than one entry for each runner that lives or that it told of, however slowly it is read. Made by
    `LeaseTable.watch`.
    """

    def __init__(self, table: LeaseTable, *, without_load: bool) -> None:
        self._table = table
        self._without_load = without_load
        self._told: set[str] = set()  # runners that the reader believes to be live
        self._changed: dict[str, Removal | None] = {}  # None: look it up in the table
        self._snapshot_due = True
        self._told_synced = False

    @property
    def pending(self) -> bool:
        """Whether `take` has something new to say."""
        return self._snapshot_due or bool(self._changed) or self._told_synced is not self._table.synced

    def take(self, now: float) -> SnapshotEvent | DeltaEvent | BookmarkEvent:
        """Returns everything since the last take as one event: a snapshot at first, a bookmark if nothing changed."""
        table, changed = self._table, self._changed
        self._changed, self._told_synced = {}, table.synced
        if self._snapshot_due:
            self._snapshot_due = False
            runners = table.leased(now)
            self._told = {leased.record.runner.runner_id for leased in runners}
            return SnapshotEvent(table.epoch, table.revision, table.synced, runners)
        if not changed:
            return BookmarkEvent(table.epoch, table.revision, table.synced)
        removals = tuple(removal for removal in changed.values() if removal is not None)
        upserts = tuple(table.leased_record(runner_id, now) for runner_id, gone in changed.items() if gone is None)
        self._told.difference_update(removal.runner_id for removal in removals)
        self._told.update(leased.record.runner.runner_id for leased in upserts)
        return DeltaEvent(table.epoch, table.revision, table.synced, upserts, removals)

    def _note_change(self, runner_id: str, *, of_load_only: bool) -> None:
        if not self._snapshot_due and not (of_load_only and self._without_load):
            self._changed[runner_id] = None

    def _note_removal(self, removal: Removal) -> None:
        if self._snapshot_due:
            return
        if removal.runner_id in self._told:
            self._changed[removal.runner_id] = removal
        else:
            self._changed.pop(removal.runner_id, None)

    def validate_state(self) -> None:
        """Raises AssertionError unless what is pending agrees with the table."""
        live = {leased.record.runner.runner_id for leased in self._table.leased(0.0)}
        assert not (self._snapshot_due and (self._changed or self._told)), "changes pend before the snapshot"
        for runner_id, gone in self._changed.items():
            assert (gone is None) == (runner_id in live), f"{runner_id} is pending as gone and lives, or the reverse"
            assert gone is None or runner_id in self._told, f"{runner_id} is to be removed and was never told"
        if not self._snapshot_due:
            assert live ^ self._told <= self._changed.keys(), "somebody came or went and nothing is pending"


class LeaseTable:
    """The leases of one life of a registry. `epoch` must be greater than that of every earlier life."""

    def __init__(self, *, epoch: int, ttl_s: float, now: float, claims: NodeClaims = NodeClaims.FIRST) -> None:
        if ttl_s <= 0:
            raise ValueError(f"a lease must last longer than {ttl_s} s")
        self.epoch = epoch
        self.ttl_s = ttl_s
        self._claims = claims
        self._revision = 0
        self._synced = False
        self._syncing_since = now
        self._swept_at = now
        self._none_lapses_before = -math.inf
        self._leases: dict[str, _Lease] = {}
        self._homes: dict[str, str] = {}  # of each runner, the node where it was last believed to be
        self._proven: dict[str, tuple[str, Claim]] = {}  # of each node, the runner whose certificate last named it
        self._watchers: set[Watcher] = set()

    @property
    def revision(self) -> int:
        """How many changes there were."""
        return self._revision

    @property
    def synced(self) -> bool:
        """Whether whoever has no lease is really gone; turns true in a sweep, once."""
        return self._synced

    def __len__(self) -> int:
        return len(self._leases)

    # --- what runners say -------------------------------------------------------------------------------------------

    def register(self, record: RunnerRecord, now: float, claim: Claim = Claim()) -> bool:  # noqa: B008 - immutable
        """Grants or renews the lease of `record`'s runner; returns whether the table changed.

        Raises StaleIncarnationError where a newer incarnation holds the lease, InvalidRequestError for impossible ids,
        PermissionDeniedError where `claim` is not good for its node.
        """
        _check_ids(record)
        runner_id, node_id = record.runner.runner_id, record.node.node_id
        others = self._others_on(node_id, runner_id)
        claims = [*(other.claim for other in others), *self._proven_by_others(node_id, runner_id)]
        check_claim(runner_id, node_id, claim, claims, self._claims, home=self._homes.get(runner_id, ""))
        lease = self._leases.get(runner_id)
        if lease is not None:
            self._refuse_stale(lease, record.runner.incarnation)
        self._remember(runner_id, node_id, claim)
        changed = lease is None or record.version > lease.record.version
        self._renew(runner_id, record if changed or lease is None else lease.record, now, claim)
        for other in others:
            other.disproved = claim.disproves(other.claim, node_id)
            if other.disproved:
                self._none_lapses_before = -math.inf
        if changed:
            self._changed(runner_id, of_load_only=False)
        return changed

    def heartbeat(
        self, runner_id: str, incarnation: int, sequence: int, state: RunnerState, load: Load, now: float
    ) -> bool:
        """Renews a lease, with what the runner says of itself; returns whether the table changed.

        Raises UnknownLeaseError where this incarnation has no lease, StaleIncarnationError where a newer one has.
        """
        lease = self._leases.get(runner_id)
        if lease is not None:
            self._refuse_stale(lease, incarnation)
        if lease is None or lease.disproved or incarnation > lease.record.runner.incarnation:
            raise UnknownLeaseError(
                f"runner {runner_id} has no lease for its incarnation {incarnation} here; register again",
                metadata={"runner_id": runner_id},
            )
        old = lease.record
        if sequence <= old.sequence:
            self._renew(runner_id, old, now, lease.claim)
            return False
        self._renew(runner_id, RunnerRecord(old.runner, old.node, state, load, sequence), now, lease.claim)
        self._changed(runner_id, of_load_only=state is old.state)
        return True

    def deregister(self, runner_id: str, incarnation: int | None) -> Removal | None:
        """Ends the lease of `incarnation` or an older one (None: of any); returns what was removed, if anything was."""
        lease = self._leases.get(runner_id)
        if lease is None or (incarnation is not None and incarnation < lease.record.runner.incarnation):
            return None
        return self._remove(runner_id, RemovalReason.DEREGISTERED)

    # --- time -------------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> tuple[Removal, ...]:
        """Removes every lapsed lease and returns the removals; to be called ten times in a TTL or oftener."""
        apart_s = now - self._swept_at
        stood_still, late_s = apart_s > self.ttl_s / 2, apart_s - self.ttl_s / 8
        self._swept_at = now
        if stood_still:
            self._syncing_since = now
            for lease in self._leases.values():
                lease.lapses_at = now + self.ttl_s
            return ()
        if late_s > 0:
            self._syncing_since += late_s
            for lease in self._leases.values():
                lease.lapses_at += late_s
        self._synced = self._synced or now - self._syncing_since >= self.ttl_s
        if now <= self._none_lapses_before:
            return ()
        lapsed = [runner_id for runner_id, lease in self._leases.items() if lease.disproved or now > lease.lapses_at]
        removals = tuple(self._remove(runner_id, RemovalReason.EXPIRED) for runner_id in lapsed)
        soonest = min((lease.lapses_at for lease in self._leases.values()), default=math.inf)
        self._none_lapses_before = min(soonest, now + self.ttl_s)  # what is renewed from now on lapses after that
        return removals

    # --- what others see --------------------------------------------------------------------------------------------

    def leased(self, now: float) -> tuple[LeasedRecord, ...]:
        """Every live runner, in the order in which they came."""
        return tuple(self.leased_record(runner_id, now) for runner_id in self._leases)

    def incarnation_of(self, runner_id: str) -> int | None:
        """The incarnation that holds a runner's lease, or None where nobody does."""
        lease = self._leases.get(runner_id)
        return None if lease is None else lease.record.runner.incarnation

    def state_of(self, runner_id: str) -> RunnerState:
        """What a live runner says of itself. Raises KeyError where there is no lease."""
        return self._leases[runner_id].record.state

    def leased_record(self, runner_id: str, now: float) -> LeasedRecord:
        """One live runner with its lease. Raises UnknownLeaseError where there is none."""
        lease = self._leases.get(runner_id)
        if lease is None:
            raise UnknownLeaseError(f"runner {runner_id} has no lease here", metadata={"runner_id": runner_id})
        return LeasedRecord(lease.record, max(0.0, now - lease.heard_at), lease.lapses_at - now)

    def watch(self, *, without_load: bool = False) -> Watcher:
        """Starts a watch, to be ended with `unwatch`. `without_load` leaves out changes of load alone."""
        watcher = Watcher(self, without_load=without_load)
        self._watchers.add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        """Ends a watch; ending it twice is no error."""
        self._watchers.discard(watcher)

    def validate_state(self) -> None:
        """Raises AssertionError unless the table is consistent in itself and with its watchers."""
        for runner_id, lease in self._leases.items():
            assert lease.record.runner.runner_id == runner_id, f"the lease of {runner_id} is somebody else's"
            assert lease.heard_at + self.ttl_s <= lease.lapses_at + 1e-6, f"{runner_id} has less than a TTL"
            node_id, claim = lease.record.node.node_id, lease.claim
            for other in self._others_on(node_id, runner_id):
                assert lease.disproved or not other.claim.disproves(claim, node_id), f"{runner_id} is not on {node_id}"
        assert self._revision >= len(self._leases), "a runner came without a revision"
        assert max(len(self._homes), len(self._proven)) <= _REMEMBERED_MAX, "more is remembered than should be"
        for watcher in self._watchers:
            watcher.validate_state()

    # --- changes ----------------------------------------------------------------------------------------------------

    def _refuse_stale(self, lease: _Lease, incarnation: int) -> None:
        runner = lease.record.runner
        if incarnation < runner.incarnation:
            raise StaleIncarnationError(
                f"runner {runner.runner_id} has a newer process, incarnation {runner.incarnation} at {runner.address}; "
                f"this one, {incarnation}, should stop",
                metadata={"runner_id": runner.runner_id, "incarnation": str(runner.incarnation)},
            )

    def _others_on(self, node_id: str, runner_id: str) -> list[_Lease]:
        return [
            lease
            for lease in self._leases.values()
            if lease.record.node.node_id == node_id
            and lease.record.runner.runner_id != runner_id
            and not lease.disproved
        ]

    def _proven_by_others(self, node_id: str, runner_id: str) -> list[Claim]:
        holder, claim = self._proven.get(node_id, (runner_id, Claim()))
        return [] if holder == runner_id else [claim]

    def _remember(self, runner_id: str, node_id: str, claim: Claim) -> None:
        self._homes.pop(runner_id, None)  # the latest are last
        self._homes[runner_id] = node_id
        if claim.proves(node_id):
            self._proven.pop(node_id, None)
            self._proven[node_id] = (runner_id, claim)
        for memory in (self._homes, self._proven):
            if len(memory) > _REMEMBERED_MAX:
                del memory[next(iter(memory))]

    def _renew(self, runner_id: str, record: RunnerRecord, now: float, claim: Claim) -> None:
        self._leases[runner_id] = _Lease(record, heard_at=now, lapses_at=now + self.ttl_s, claim=claim)

    def _remove(self, runner_id: str, reason: RemovalReason) -> Removal:
        lease = self._leases.pop(runner_id)
        removal = Removal(runner_id, lease.record.runner.incarnation, reason)
        self._revision += 1
        for watcher in self._watchers:
            watcher._note_removal(removal)
        return removal

    def _changed(self, runner_id: str, *, of_load_only: bool) -> None:
        self._revision += 1
        for watcher in self._watchers:
            watcher._note_change(runner_id, of_load_only=of_load_only)


def _check_ids(record: RunnerRecord) -> None:
    """Raises InvalidRequestError unless a lease can be kept under this record's ids."""
    for field, value in (
        ("record.runner.runner_id", record.runner.runner_id),
        ("record.node.node_id", record.node.node_id),
    ):
        if not 0 < len(value) <= 253:
            raise InvalidRequestError(field, "must have 1 to 253 characters")
