"""How long requests take, by what those of late took: the rates by which waits are told and deadlines judged."""

from __future__ import annotations

from dataclasses import dataclass

_SMOOTHING = 0.1
# Fewer say too little to refuse anybody by.
_ENOUGH = 5


@dataclass(slots=True)
class Pace:
    """Fading means of requests that ended well: seconds each, and tokens generated for each."""

    typical_s: float = 0.0
    typical_tokens: float = 0.0
    count: int = 0

    @property
    def is_known(self) -> bool:
        """Whether enough have ended to go by."""
        return self.count >= _ENOUGH

    def note(self, seconds: float, tokens: int) -> None:
        """A request ended well after so long, with so many tokens."""
        self.count += 1
        weight = max(_SMOOTHING, 1.0 / self.count)  # the plain mean at first
        self.typical_s += weight * (seconds - self.typical_s)
        self.typical_tokens += weight * (tokens - self.typical_tokens)

    def expected_s(self, most_tokens: int) -> float:
        """How long one takes that generates `most_tokens` at most (0: no bound is known)."""
        if not 0 < most_tokens < self.typical_tokens:
            return self.typical_s
        return self.typical_s * most_tokens / self.typical_tokens
