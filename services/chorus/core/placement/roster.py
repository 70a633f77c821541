"""Who may serve a kind of request, remembered from one request to the next.

Loads change with every heartbeat, models and labels hardly ever. So the runners that fit a request's lasting needs are
worked out once, and kept until a runner comes, goes or changes; only the load is looked at for every request.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from chorus.core.fleet.directory import Directory, DirectoryChange, DirectoryEntry
from chorus.core.placement.fit import has_loaded, may_fit
from chorus.core.placement.models import default_model
from chorus.core.placement.needs import Needs, Work

# Kinds of request remembered; past it, everything is forgotten and worked out anew.
MAX_KINDS = 512


class Pool(NamedTuple):
    """Ids of runners, sorted: of `everybody` who may serve a kind of request, and of the `warm` ones among them, which
    need not load a model first."""

    everybody: tuple[str, ...]
    warm: tuple[str, ...]


class Roster:
    """Pools of runner ids by kind of request: a memory, not a decision; placement checks whomever it takes from one."""

    def __init__(self) -> None:
        self._directory = Directory()
        self._pools: dict[Hashable, Pool] = {}
        self._homes: dict[Hashable, str] = {}  # in this very directory
        self._defaults: dict[tuple[Work, str | None], str] = {}

    def resolve(self, needs: Needs, directory: Directory, configured: str | None = None) -> Needs:
        """The needs with the mesh's default model where the request names none, and nothing else chooses one."""
        if needs.model or needs.wants_any_model:
            return needs
        self._follow(directory)
        kind = (needs.work, configured)
        if kind not in self._defaults:
            self._defaults[kind] = default_model(directory, needs.work, configured)
        return needs.with_model(self._defaults[kind])

    def pool(self, needs: Needs, directory: Directory) -> Pool:
        """The runners of `directory`, by id, that pass every check but those of load, prompt and moment."""
        self._follow(directory)
        kind = _kind(needs)
        pool = self._pools.get(kind)
        if pool is None:
            if len(self._pools) >= MAX_KINDS:
                self._pools.clear()
            entries = directory.entries
            ids = sorted(runner_id for runner_id, entry in entries.items() if may_fit(needs, entry.record))
            pool = self._pools[kind] = pool_of(needs, directory, ids)
        return pool

    def home(self, needs: Needs, directory: Directory) -> str:
        """The home of such a request in this directory, where it was looked for; else empty."""
        self._follow(directory)
        return self._homes.get(_kind(needs), "") if self._homes else ""

    def remember_home(self, needs: Needs, runner_id: str) -> None:
        """Whom placement found to be the home, in the directory that was asked about last."""
        if len(self._homes) < MAX_KINDS:
            self._homes[_kind(needs)] = runner_id

    def follow(self, change: DirectoryChange, directory: Directory) -> None:
        """The directory is this one now, by that change of the last one that was told here or asked about.

        Whoever tells of each change spares the next request the search for all of them.
        """
        if change.removed or any(
            _is_new(self._directory.get(entry.record.runner.runner_id), entry) for entry in change.upserts
        ):
            self._pools.clear()
            self._defaults.clear()
        self._homes.clear()
        self._directory = directory

    def _follow(self, directory: Directory) -> None:
        """Forgets everything once the directory has changed in more than load."""
        if directory is not self._directory:
            self.follow(directory.changes_since(self._directory), directory)


def pool_of(needs: Needs, directory: Directory, ids: Sequence[str]) -> Pool:
    """Sorted ids as a pool: who of them has a model for the request in memory is looked up."""
    entries = directory.entries
    everybody = tuple(ids)
    warm = tuple([name for name in ids if name in entries and has_loaded(needs, entries[name].record)])
    return Pool(everybody, warm if len(warm) < len(everybody) else everybody)


def _kind(needs: Needs) -> Hashable:
    """What requests share that fit the same runners; the length of the prompt is not part of it."""
    return (
        needs.work,
        needs.model,
        needs.features,
        needs.adapter,
        tuple(sorted(needs.labels.items())),
        needs.tier,
        needs.tags,
        needs.artifact_sha256,
        needs.runner_ids,
        needs.node_ids,
        needs.private,
        needs.allow_external,
    )


def _is_new(before: DirectoryEntry | None, after: DirectoryEntry) -> bool:
    """Whether anything but load and reachability changed."""
    if before is None:
        return True
    old, new = before.record, after.record
    # What a registry tells again unchanged is the same object (wire/directory.py), so that this need not look into it.
    changed = old.runner is not new.runner and old.runner != new.runner
    return changed or old.state is not new.state or old.node.labels != new.node.labels
