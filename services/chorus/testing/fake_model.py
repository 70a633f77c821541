"""Models of the fake engine: what it says of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from chorus.core.errors import ChorusError
from chorus.core.fleet.records import Artifact, Feature, Tier

FAKE_FEATURES = frozenset(Feature) - {
    Feature.IMAGES,
    Feature.REASONING,
    Feature.GRAMMAR,
    Feature.JSON_SCHEMA,
    Feature.REGEX,
    Feature.CONTEXT_SHIFT,
    Feature.ADAPTER,
}


def fake_artifact(name: str = "fake-1b.Q8_0.gguf", *, family: str = "fake-1b", tier: Tier = Tier.SMALL) -> Artifact:
    """An artifact that no file stands behind; its SHA-256 is that of its name."""
    return Artifact(
        family=family,
        name=name,
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        size_bytes=1_000_000_000,
        quantization="Q8_0",
        parameter_count=1_100_000_000,
        context_length=8192,
        architecture="fake",
        tier=tier,
        tags=("chat",),
        license="Apache-2.0",
    )


@dataclass(frozen=True)
class FakeModel:
    """A model of the fake engine. An answer has `answer_tokens` tokens before its end, where nothing ends it sooner."""

    artifact: Artifact = field(default_factory=fake_artifact)
    features: frozenset[Feature] = FAKE_FEATURES
    context_length: int = 4096
    answer_tokens: int = 64
    loaded: bool = True
    load_error: ChorusError | None = None
