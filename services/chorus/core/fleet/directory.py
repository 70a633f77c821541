"""The directory that a coordinator places by: what several registries say, merged. Sans I/O; `now` is monotonic.

Registries know nothing of each other, so they differ: one restarts empty, a runner reaches one and not the other, a
lapse is noticed here a moment before there. What counts:

- Of one runner, the greatest (incarnation, sequence) that anybody told.
- A live lease wins: a runner stays while any connected registry holds it, whatever the others say.
- Word from before is *carried* on where a registry can't be asked: its connection is lost, or it has restarted and
  isn't synced yet. A carried runner stays until one of these says otherwise:
  - a registry withdraws that incarnation or a newer one: it sends a removal, or a synced snapshot without somebody
    whom it had told of, or turns synced while the runner is still not back;
  - a lost registry: another one has been connected and synced for `linger_s` since. A runner that could reach that one
    has a lease there by then, so nobody vouches for this one any more.
- While no connected registry is synced, nobody is removed but by an explicit removal: a coordinator that sees no
  registry goes on with the last directory.
- A broken connection to a runner, seen by the coordinator itself, counts at once (`mark_unreachable`), until the runner
  answers again, comes back as another incarnation, or leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from chorus.core.errors import MalformedMessageError
from chorus.core.fleet.events import (
    BookmarkEvent,
    DeltaEvent,
    DirectoryEvent,
    LeasedRecord,
    SnapshotEvent,
)
from chorus.core.fleet.records import RunnerRecord

LINGER_S = 10.0


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One live runner. `heard_at` is when it last gave a registry a sign of life, by this process's monotonic clock;
    `reachable` is false while the coordinator's own connection to it is broken."""

    record: RunnerRecord
    heard_at: float
    reachable: bool = True


@dataclass(frozen=True, slots=True)
class DirectoryChange:
    """What turned one directory into a later one."""

    upserts: tuple[DirectoryEntry, ...]
    removed: tuple[RunnerRecord, ...]


@dataclass(frozen=True, slots=True)
class Directory:
    """An immutable snapshot of the live runners by runner id; a change makes another, of a greater version.

    `synced` says whether some connected registry has lived for a TTL, so that whoever is absent is really gone.
    """

    version: int = 0
    entries: Mapping[str, DirectoryEntry] = field(default_factory=lambda: MappingProxyType({}))
    synced: bool = False

    def get(self, runner_id: str) -> DirectoryEntry | None:
        """The entry of a runner, or None."""
        return self.entries.get(runner_id)

    def leased(self, now: float) -> tuple[LeasedRecord, ...]:
        """Every runner by id, with the age of its last sign of life."""
        return tuple(
            LeasedRecord(entry.record, max(0.0, now - entry.heard_at)) for _, entry in sorted(self.entries.items())
        )

    def changes_since(self, older: Directory) -> DirectoryChange:
        """What changed from `older` to this one."""
        return DirectoryChange(
            tuple(entry for runner_id, entry in self.entries.items() if older.entries.get(runner_id) is not entry),
            tuple(entry.record for runner_id, entry in older.entries.items() if runner_id not in self.entries),
        )


@dataclass(frozen=True, slots=True)
class RegistryView:
    """How a coordinator stands with one registry. `lost_at` is None while it is connected."""

    registry: str
    epoch: int
    revision: int
    synced: bool
    runner_count: int
    lost_at: float | None


@dataclass(frozen=True, slots=True)
class _Claim:
    """What one registry said of a runner, and when the runner was last heard."""

    record: RunnerRecord
    heard_at: float

    @property
    def incarnation(self) -> int:
        return self.record.runner.incarnation


@dataclass(slots=True)
class _View:
    """What one registry says: `held` on its present stream; `carried` from before, not yet confirmed or withdrawn."""

    epoch: int
    revision: int
    synced: bool
    held: dict[str, _Claim] = field(default_factory=dict)
    carried: dict[str, _Claim] = field(default_factory=dict)
    lost_at: float | None = None


class DirectoryMerger:
    """Merges the event streams of any number of registries, each under a key of the caller's, into one directory.

    `linger_s` must be longer than a lease's TTL and the time in which a runner finds a registry again.
    """

    def __init__(self, *, linger_s: float = LINGER_S) -> None:
        self._linger_s = linger_s
        self._views: dict[str, _View] = {}
        self._unreachable: dict[str, int] = {}
        self._synced_since: float | None = None  # since when some connected registry is synced, without a break
        self._directory = Directory()

    @property
    def directory(self) -> Directory:
        """The directory as of the last call."""
        return self._directory

    def registries(self) -> tuple[RegistryView, ...]:
        """How we stand with each registry that has told us something, by key."""
        return tuple(
            RegistryView(key, view.epoch, view.revision, view.synced, len(view.held), view.lost_at)
            for key, view in sorted(self._views.items())
        )

    # --- events -----------------------------------------------------------------------------------------------------

    def apply(self, registry: str, event: DirectoryEvent, now: float) -> Directory:
        """Takes in the next event of a registry's stream and returns the directory that follows.

        Raises MalformedMessageError where the stream breaks its contract (no snapshot first, another epoch without one,
        a revision that falls); the stream must then be closed, `registry_lost` called, and the watch begun anew.
        """
        if isinstance(event, SnapshotEvent):
            touched = self._apply_snapshot(registry, event, now)
        else:
            view = self._continued_view(registry, event)
            view.revision = event.revision
            touched = self._apply_delta(view, event, now) if isinstance(event, DeltaEvent) else set()
            if event.synced and not view.synced:
                view.synced = True
                touched |= self._withdraw_carried(view)
        return self._publish(touched, now)

    def registry_lost(self, registry: str, now: float) -> Directory:
        """Notes that the stream of a registry has ended, however it did; an unknown key is no error."""
        view = self._views.get(registry)
        if view is None or view.lost_at is not None:
            return self._directory
        view.lost_at = now
        view.carried.update(
            (runner_id, claim)
            for runner_id, claim in view.held.items()
            if runner_id not in view.carried or view.carried[runner_id].incarnation <= claim.incarnation
        )
        view.held = {}
        return self._publish(set(), now)

    def mark_unreachable(self, runner_id: str, incarnation: int, now: float) -> Directory:
        """Notes that the coordinator's connection to this incarnation broke; no effect if another one is listed."""
        entry = self._directory.get(runner_id)
        if entry is not None and entry.record.runner.incarnation == incarnation:
            self._unreachable[runner_id] = incarnation
        return self._publish({runner_id}, now)

    def mark_reachable(self, runner_id: str, now: float) -> Directory:
        """Notes that the runner answers again."""
        self._unreachable.pop(runner_id, None)
        return self._publish({runner_id}, now)

    # --- views ------------------------------------------------------------------------------------------------------

    def _continued_view(self, registry: str, event: DeltaEvent | BookmarkEvent) -> _View:
        view = self._views.get(registry)
        if view is None or view.lost_at is not None:
            raise MalformedMessageError(f"the registry {registry} did not begin its watch with a snapshot")
        if event.epoch != view.epoch:
            raise MalformedMessageError(f"the registry {registry} began another epoch without a snapshot")
        if event.revision < view.revision:
            raise MalformedMessageError(
                f"the registry {registry} went back from revision {view.revision} to {event.revision}"
            )
        return view

    def _apply_snapshot(self, registry: str, event: SnapshotEvent, now: float) -> set[str]:
        before = self._views.get(registry)
        view = _View(event.epoch, event.revision, event.synced, held=_claims(event.runners, now))
        touched = set(view.held)
        self._views[registry] = view
        if before is not None:
            view.carried = {
                runner_id: claim
                for runner_id, claim in (before.held | before.carried).items()
                if runner_id not in view.held or view.held[runner_id].incarnation < claim.incarnation
            }
            touched |= before.held.keys() | before.carried.keys()
        if view.synced:
            touched |= self._withdraw_carried(view)
        return touched

    def _apply_delta(self, view: _View, event: DeltaEvent, now: float) -> set[str]:
        touched: set[str] = set()
        for removal in event.removals:
            touched.add(removal.runner_id)
            held = view.held.get(removal.runner_id)
            if held is not None and held.incarnation <= removal.incarnation:
                del view.held[removal.runner_id]
            self._withdraw(removal.runner_id, removal.incarnation)
        for runner_id, claim in _claims(event.upserts, now).items():
            touched.add(runner_id)
            held = view.held.get(runner_id)
            if held is not None and held.incarnation > claim.incarnation:
                self._withdraw(runner_id, held.incarnation)
            view.held[runner_id] = claim
            carried = view.carried.get(runner_id)
            if carried is not None and carried.incarnation <= claim.incarnation:
                del view.carried[runner_id]
        return touched

    def _withdraw_carried(self, view: _View) -> set[str]:
        """A registry has turned synced: whoever isn't back there is gone, as far as it knows."""
        missing, view.carried = view.carried, {}
        for runner_id, claim in missing.items():
            self._withdraw(runner_id, claim.incarnation)
        return set(missing)

    def _withdraw(self, runner_id: str, incarnation: int) -> None:
        """Some registry says that this incarnation is gone: nobody's word from before may keep it."""
        for view in self._views.values():
            carried = view.carried.get(runner_id)
            if carried is not None and carried.incarnation <= incarnation:
                del view.carried[runner_id]

    def _lapse(self, now: float) -> set[str]:
        """Forgets registries that have been lost for long enough while another one could be asked."""
        if self._synced_since is None:
            return set()
        touched: set[str] = set()
        for key, view in list(self._views.items()):
            if view.lost_at is not None and now - max(view.lost_at, self._synced_since) >= self._linger_s:
                touched |= view.carried.keys()
                del self._views[key]
        return touched

    # --- the directory ----------------------------------------------------------------------------------------------

    def _publish(self, touched: set[str], now: float) -> Directory:
        synced = any(view.synced and view.lost_at is None for view in self._views.values())
        if not synced:
            self._synced_since = None
        elif self._synced_since is None:
            self._synced_since = now
        touched = touched | self._lapse(now)
        old = self._directory
        changed = {runner_id: self._entry(runner_id) for runner_id in touched}
        changed = {runner_id: entry for runner_id, entry in changed.items() if entry != old.entries.get(runner_id)}
        if changed or synced is not old.synced:
            entries = {**old.entries, **changed}
            live = {runner_id: entry for runner_id, entry in entries.items() if entry is not None}
            self._directory = Directory(old.version + 1, MappingProxyType(live), synced)
        return self._directory

    def _entry(self, runner_id: str) -> DirectoryEntry | None:
        claims = [
            said[runner_id] for view in self._views.values() for said in (view.held, view.carried) if runner_id in said
        ]
        if not claims:
            self._unreachable.pop(runner_id, None)
            return None
        newest = max(claims, key=lambda claim: claim.record.version)
        heard_at = max(claim.heard_at for claim in claims if claim.incarnation == newest.incarnation)
        if self._unreachable.get(runner_id, newest.incarnation) != newest.incarnation:
            del self._unreachable[runner_id]
        return DirectoryEntry(newest.record, heard_at, reachable=runner_id not in self._unreachable)

    def validate_state(self) -> None:
        """Raises AssertionError unless the directory is what the views add up to."""
        told = {runner_id for view in self._views.values() for said in (view.held, view.carried) for runner_id in said}
        assert told == self._directory.entries.keys(), "the directory and the registries' views name different runners"
        assert self._unreachable.keys() <= told, "a mark outlived its runner"
        for runner_id, entry in self._directory.entries.items():
            assert self._entry(runner_id) == entry, f"the entry of {runner_id} is out of date"
        for key, view in self._views.items():
            assert view.lost_at is None or not view.held, f"{key} is lost and still vouches for somebody"
            assert not (view.carried and view.synced and view.lost_at is None), f"{key} is synced and still carries"


def _claims(runners: Iterable[LeasedRecord], now: float) -> dict[str, _Claim]:
    return {leased.record.runner.runner_id: _Claim(leased.record, now - leased.lease_age_s) for leased in runners}
