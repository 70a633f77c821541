"""The fake engine as `chorus runner` hosts it (`runner.engine = "fake"`)."""

from __future__ import annotations

from chorus.config import RunnerSettings
from chorus.runner.engines import HostedEngine
from chorus.testing.engine_fake import FakeEngine


def make_fake_engine(settings: RunnerSettings) -> HostedEngine:
    """A fake engine with the slots and the queue that the runner was given."""
    return HostedEngine(FakeEngine(slots=settings.slots, max_queue=settings.max_queue))
