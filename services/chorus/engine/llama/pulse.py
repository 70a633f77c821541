"""What an owner thread shows of the step it is in, so that the event loop can tell a long one from one that never ends.

The thread marks the beginning and the end of its steps, in a microsecond or two. Nothing is locked, since each mark is
one assignment.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable

from chorus.core.resilience.stuck import Step, StepTimes


class Pulse:
    """Written by one owner thread; `step` may be read from any. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: defaultdict[Hashable, StepTimes] = defaultdict(StepTimes)
        self._mark: tuple[int, float, StepTimes] | None = None  # tokens, when it began, what such steps took before
        self.born = clock()

    @property
    def step(self) -> Step | None:
        """The step that is under way."""
        mark = self._mark
        return None if mark is None else Step(mark[0], mark[1], mark[2].expected_s(mark[0]))

    def begin(self, tokens: int, kind: Hashable = "decode") -> None:
        """So many tokens, at least 1, go to llama.cpp now; whatever was begun before has ended.

        Work that takes other times is another `kind`.
        """
        now = self._clock()
        self._learn(now)
        self._mark = tokens, now, self._times[kind]

    def end(self) -> None:
        """Nothing is under way any more. Called between two steps, it does nothing."""
        if self._mark is not None:
            self._learn(self._clock())

    def _learn(self, now: float) -> None:
        mark, self._mark = self._mark, None
        if mark is not None:
            tokens, began, times = mark
            times.took(tokens, now - began)
