"""How often somebody may try: a bucket of tries for each caller, and one for all together."""

from __future__ import annotations

from collections import OrderedDict

from chorus.core.errors import OverloadedError


class Attempts:
    """Each caller has `burst` tries, which come back at `per_s`; all callers together have `shared` times as many.

    At most `most` callers are remembered, the one that tried longest ago being forgotten first. `now` is in seconds of
    any clock that rises.
    """

    def __init__(self, *, burst: int, per_s: float, shared: int = 10, most: int = 4096) -> None:
        self._burst = float(burst)
        self._per_s = per_s
        self._most = most
        self._shared = shared
        self._callers: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and when that was
        self._all = (self._burst * shared, float("-inf"))

    def take(self, caller: str, now: float) -> None:
        """Counts one try. Raises OverloadedError, saying when to try again, where there are none left."""
        mine = self._left(self._callers.get(caller, (self._burst, now)), self._burst, self._per_s, now)
        everybody = self._left(self._all, self._burst * self._shared, self._per_s * self._shared, now)
        wait_s = max((1 - mine) / self._per_s, (1 - everybody) / (self._per_s * self._shared))
        if wait_s > 0:
            raise OverloadedError(f"too many tries; the next may come in {wait_s:.0f} s", retry_after_s=wait_s)
        self._callers[caller] = (mine - 1, now)
        self._callers.move_to_end(caller)
        self._all = (everybody - 1, now)
        if len(self._callers) > self._most:
            self._callers.popitem(last=False)

    @staticmethod
    def _left(known: tuple[float, float], burst: float, per_s: float, now: float) -> float:
        left, at = known
        return min(burst, left + max(0.0, now - at) * per_s)
