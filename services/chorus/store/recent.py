"""The answers asked for last, in memory in front of a store, so that a hit waits for no thread and no disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from chorus.store.answers import Kept

_MAX_BYTES = 16 << 20
_MAX_ANSWER = 256 << 10


class Recent:
    """At most `_MAX_BYTES` of answers to the very same requests, each by key and the artifacts that might answer.

    A search of the store begins with `searching()`, and what it found is kept by `found()`, unless the store has
    changed for that key, or altogether, meanwhile. Used from one event loop.
    """

    def __init__(self) -> None:
        self._found: OrderedDict[str, dict[tuple[str, ...], Kept]] = OrderedDict()
        self._size = 0
        self._changes = 0

    def find(self, key: str, sha256s: Sequence[str], *, since: float) -> Kept | None:
        """The newest answer by one of these artifacts, made after `since`; None: look into the store."""
        kept = self._found.get(key, {}).get(tuple(sha256s))
        if kept is None or kept.made <= since:
            return None
        self._found.move_to_end(key)
        return kept

    def searching(self) -> int:
        """What `found` is to be given with the result."""
        return self._changes

    def found(self, key: str, sha256s: Sequence[str], kept: Kept, begun: int) -> None:
        """A search that was begun then has found this."""
        if begun != self._changes or len(kept.answer) > _MAX_ANSWER:
            return
        by_artifacts = self._found.setdefault(key, {})
        if tuple(sha256s) not in by_artifacts:
            by_artifacts[tuple(sha256s)] = kept
            self._size += len(kept.answer)
        while self._size > _MAX_BYTES:
            self._forget(next(iter(self._found)))

    def changed(self, key: str) -> None:
        """Another answer is to be found for that key, or has been kept just now."""
        self._changes += 1
        self._forget(key)

    def clear(self) -> None:
        """Any answer may be gone."""
        self._changes += 1
        self._found.clear()
        self._size = 0

    def _forget(self, key: str) -> None:
        self._size -= sum(len(kept.answer) for kept in self._found.pop(key, {}).values())
