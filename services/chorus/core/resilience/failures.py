"""Recent failures as a cost, so that a runner which fails fast is never cheap.

A runner that answers every request with an instant error looks idle: least-loaded routing would send it everything. So
each failure adds seconds to its cost, which fade exponentially; a success takes most of them away at once. The fading
is what probes it: once its cost is near the others', it is asked again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from chorus.core.errors import ChorusError, EngineError, InternalError, UnavailableError

_BLAMES = (UnavailableError, EngineError, InternalError)
_NEGLIGIBLE_S = 0.01


def blames_runner(error: ChorusError) -> bool:
    """Whether an attempt's error speaks against the runner: not where the request was wrong, the caller went away, the
    runner was full, or it said that it was leaving."""
    return isinstance(error, _BLAMES)


@dataclass(slots=True)
class _Penalty:
    incarnation: int
    seconds: float
    as_of: float


class Failures:
    """Penalties of runners, in seconds of cost. `now` is monotonic.

    `per_failure_s` is added by each failure, up to `most_s` in all; half of it has faded after `half_life_s`. With the
    defaults a runner that failed without end is asked again some 40 s after its last failure.
    """

    def __init__(self, *, per_failure_s: float = 20.0, most_s: float = 60.0, half_life_s: float = 6.0) -> None:
        self._per_failure_s = per_failure_s
        self._most_s = most_s
        self._half_life_s = half_life_s
        self._penalties: dict[str, _Penalty] = {}

    def failed(self, runner_id: str, incarnation: int, now: float) -> None:
        """An attempt on that runner failed through its own fault."""
        seconds = self._left(runner_id, incarnation, now) + self._per_failure_s
        self._penalties[runner_id] = _Penalty(incarnation, min(seconds, self._most_s), now)

    def succeeded(self, runner_id: str, incarnation: int, now: float) -> None:
        """An attempt on that runner succeeded."""
        seconds = self._left(runner_id, incarnation, now) / 4
        if seconds < _NEGLIGIBLE_S:
            self._penalties.pop(runner_id, None)
        else:
            self._penalties[runner_id] = _Penalty(incarnation, seconds, now)

    def forget(self, runner_id: str) -> None:
        """The runner left the directory."""
        self._penalties.pop(runner_id, None)

    def penalties(self, now: float) -> Mapping[str, float]:
        """What each runner's failures still cost, in seconds; runners that cost nothing more are left out."""
        if not self._penalties:  # the usual case, on every request's path
            return {}
        left: dict[str, float] = {}
        for runner_id, penalty in tuple(self._penalties.items()):
            seconds = self._faded(penalty, now)
            if seconds >= _NEGLIGIBLE_S:
                left[runner_id] = seconds
            else:
                del self._penalties[runner_id]
        return left

    def _left(self, runner_id: str, incarnation: int, now: float) -> float:
        """What is left of that incarnation's penalty; another process is another start."""
        penalty = self._penalties.get(runner_id)
        if penalty is None or penalty.incarnation != incarnation:
            return 0.0
        return self._faded(penalty, now)

    def _faded(self, penalty: _Penalty, now: float) -> float:
        age: float = max(0.0, now - penalty.as_of)
        return float(penalty.seconds * 0.5 ** (age / self._half_life_s))
