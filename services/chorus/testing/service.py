"""The fake engine as `chorus runner` hosts it (`runner.engine = "fake"`)."""

from __future__ import annotations

import os

from chorus.config import RunnerSettings
from chorus.runner.engines import HostedEngine
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.fake_model import FakeModel, fake_artifact

TOKENS_PER_SECOND_ENV = "CHORUS_FAKE_TOKENS_PER_SECOND"
"""How fast the fake engine of a runner's process speaks, for a test that needs an answer to last; unset: at once."""

FAMILY_ENV = "CHORUS_FAKE_FAMILY"
"""The family of its model, for a test that needs one which nobody else has; unset: everybody's."""


def make_fake_engine(settings: RunnerSettings) -> HostedEngine:
    """A fake engine with the slots and the queue that the runner was given."""
    tokens_per_second = float(os.environ.get(TOKENS_PER_SECOND_ENV, "0"))
    family = os.environ.get(FAMILY_ENV)
    model = FakeModel(fake_artifact(f"{family}.Q8_0.gguf", family=family)) if family else FakeModel()
    return HostedEngine(
        FakeEngine((model,), slots=settings.slots, max_queue=settings.max_queue, tokens_per_second=tokens_per_second)
    )
