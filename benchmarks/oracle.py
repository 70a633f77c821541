"""What callers saw of streams, whose tokens are known beforehand: lost, doubled or wrong, and how long a gap was.

The fake engine's tokens tell their place in the answer, so what arrives is checked exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from chorus.core.generation import GenerationRequest, TextPrompt, TokenDelta
from chorus.testing.engine_fake import FakeEngine


@dataclass(frozen=True)
class Gap:
    """How long a caller of `client` got nothing of a stream when somebody else (`lost`) took over."""

    client: str  # python or node
    lost: str  # runner or coordinator
    seconds: float
    at: float  # when it ended, as `time.time` has it


@dataclass
class Tally:
    """What the callers saw. `wrong` counts by what went wrong."""

    streams: int = 0
    tokens: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    gaps: list[Gap] = field(default_factory=list)
    told: list[str] = field(default_factory=list)  # of what failed, in words

    def judge(self, right: Sequence[int], got: Sequence[int]) -> None:
        """A whole answer."""
        self.streams += 1
        self.tokens += len(got)
        self.wrong["lost"] += max(len(right) - len(got), 0)
        self.wrong["doubled"] += max(len(got) - len(right), 0)
        self.wrong["wrong"] += sum(a != b for a, b in zip(got, right, strict=False))

    def failed(self, reason: str, why: str) -> None:
        """A stream that ended with an error."""
        self.wrong[f"failed: {reason}"] += 1
        self.told.append(why)

    @property
    def troubles(self) -> dict[str, int]:
        """All that went wrong."""
        return {what: count for what, count in self.wrong.items() if count}


def ask(text: str) -> GenerationRequest:
    """The request of a stream."""
    return GenerationRequest(model="", prompt=TextPrompt(text))


async def right_ids(text: str) -> list[int]:
    """What each runner answers."""
    events = FakeEngine().generate(ask(text))
    return [token async for event in events if isinstance(event, TokenDelta) for token in event.token_ids]
