"""Which refusals are worth an entry in an audit log: whoever goes on asking for what he may not have can't fill it."""

from __future__ import annotations

from dataclasses import dataclass

_APART_S = 60.0
_CALLERS_MAX = 1_000


@dataclass(slots=True)
class _Kept:
    noted_at: float
    since: int = 0


class Refusals:
    """The first refusal of a caller for a reason is noted, and then one a minute. Times are monotonic, in seconds.

    The thousand callers and reasons that were noted last are remembered, so that memory has a bound.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], _Kept] = {}

    def unnoted(self, caller: str, reason: str, now: float) -> int | None:
        """How many of the same were left out before this one; None where this one is left out, too."""
        known = self._kept.get((caller, reason))
        if known is not None and now < known.noted_at + _APART_S:
            known.since += 1
            return None
        self._kept.pop((caller, reason), None)  # the latest are last
        self._kept[caller, reason] = _Kept(now)
        if len(self._kept) > _CALLERS_MAX:
            del self._kept[next(iter(self._kept))]
        return 0 if known is None else known.since
