"""What an owner thread shows of the step it is in, so that the event loop can tell a long one from one that never ends.

The thread marks the beginning and the end of its steps; nothing is locked, since each mark is one assignment.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable

from chorus.core.resilience.stuck import Step, StepTimes


class Pulse:
    """Written by one owner thread; `step` may be read from any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: defaultdict[Hashable, StepTimes] = defaultdict(StepTimes)
        self._kind: Hashable = None
        self._count = 0
        self.born = clock()
        self.step: Step | None = None

    def begin(self, tokens: int, kind: Hashable = "decode") -> None:
        """So many tokens, at least 1, go to llama.cpp now. Ends what was begun before; what takes other times is
        another `kind`."""
        now = self._clock()
        self._learn(now)
        self._count += 1
        self._kind = kind
        self.step = Step(self._count, tokens, now, self._times[kind].expected_s(tokens))

    def end(self) -> None:
        """Nothing is under way any more. Called between two steps, it does nothing."""
        if self.step is not None:
            self._learn(self._clock())

    def _learn(self, now: float) -> None:
        step, self.step = self.step, None
        if step is not None:
            self._times[self._kind].took(step.tokens, now - step.began)
