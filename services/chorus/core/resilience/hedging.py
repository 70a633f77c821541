"""Hedging for latency: a second attempt beside one whose first token is late, after J. Dean's and L. A. Barroso's "The
Tail at Scale" (2013). Whichever brings a token first answers; the other is cancelled.

Late is what only one attempt in twenty of that model's is, for prompts of about that length (reading a long one takes
long on any runner). So at most some 5% of attempts are hedged while all is well, and where everything has become slow
the retry budget bounds them. Times are in seconds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import StrEnum

from chorus.core.generation import GenerationRequest, Priority

SHARE = 0.95
# Fewer say nothing of one in twenty.
LEAST_SAMPLES = 20
WINDOW = 200
# Nobody feels less than this, and a second attempt costs more than it saves.
LEAST_S = 0.05
# Models times lengths of prompts.
_MAX_KINDS = 512


class HedgeMode(StrEnum):
    """When a second attempt may be made."""

    NEVER = "never"
    ASKED = "asked"  # where the request allows it
    ALWAYS = "always"


def may_be_hedged(request: GenerationRequest, mode: HedgeMode, *, allowed: bool) -> bool:
    """Whether a request may be sent to two runners; `allowed` is what it says itself.

    Never one with tools that act: its second attempt could act a second time. Nor one that nobody waits for, or that
    goes on with an answer, which is resuming's matter.
    """
    if mode is HedgeMode.NEVER or (mode is HedgeMode.ASKED and not allowed):
        return False
    if any(tool.acts for tool in request.tools) or request.resume:
        return False
    return request.priority is Priority.INTERACTIVE


@dataclass(slots=True)
class _Window:
    """The last of the times, in the order in which they came and by size."""

    times: deque[float] = field(default_factory=deque)
    ordered: list[float] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        self.times.append(seconds)
        insort(self.ordered, seconds)
        if len(self.times) > WINDOW:
            del self.ordered[bisect_left(self.ordered, self.times.popleft())]


class FirstTokenTimes:
    """How long attempts took to their first token, by model and length of prompt."""

    def __init__(self) -> None:
        self._windows: OrderedDict[tuple[str, int], _Window] = OrderedDict()

    def note(self, model: str, prompt_tokens: int, seconds: float) -> None:
        """An attempt brought its first token after so long, or was cancelled then because another one had."""
        key = (model, _length(prompt_tokens))
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window()
            if len(self._windows) > _MAX_KINDS:
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end(key)
        window.add(seconds)

    def late_after(self, model: str, prompt_tokens: int) -> float | None:
        """After how long an attempt is later than 95% are; None where too few are known."""
        window = self._windows.get((model, _length(prompt_tokens)))
        if window is None or len(window.ordered) < LEAST_SAMPLES:
            return None
        ordered = window.ordered
        return max(LEAST_S, ordered[min(len(ordered) - 1, int(SHARE * len(ordered)))])


def _length(prompt_tokens: int) -> int:
    """Lengths that are told apart: each class reaches four times as far as the one before it."""
    return (max(prompt_tokens, 1).bit_length() - 1) // 2
