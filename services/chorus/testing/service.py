"""The fake engine as `chorus runner` hosts it (`runner.engine = "fake"`)."""

from __future__ import annotations

import os

from chorus.config import RunnerSettings
from chorus.runner.engines import HostedEngine
from chorus.testing.engine_fake import FakeEngine

TOKENS_PER_SECOND_ENV = "CHORUS_FAKE_TOKENS_PER_SECOND"
"""How fast the fake engine of a runner's process speaks, for a test that needs an answer to last; unset: at once."""


def make_fake_engine(settings: RunnerSettings) -> HostedEngine:
    """A fake engine with the slots and the queue that the runner was given."""
    tokens_per_second = float(os.environ.get(TOKENS_PER_SECOND_ENV, "0"))
    return HostedEngine(
        FakeEngine(slots=settings.slots, max_queue=settings.max_queue, tokens_per_second=tokens_per_second)
    )
