"""A model in memory, shared by every test of the llama.cpp engine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

from chorus.core.fleet.records import Artifact, Tier
from chorus.engine.llama import LlamaEngine, LlamaSettings, ModelSource
from chorus.testing import packaged_models
from chorus.testing.packaged_models import smollm2_path
from chorus.testing.shallow_model import cut_layers

pytest.register_assert_rewrite(
    "chorus.testing.engine_conformance", "chorus.testing.engine_conformance_forms", "chorus.testing.engine_subject"
)

SETTINGS = LlamaSettings(slots=2, context_length=256, max_queue=2, threads=1, prefill_tokens=64)


def smollm2(path: Path | None = None, **changes: object) -> ModelSource:
    """SmolLM2 as a source; `path` for a file of the same kind elsewhere."""
    path = path or smollm2_path()
    artifact = Artifact(
        family="smollm2-135m-instruct",
        name=path.name,
        sha256=hashlib.sha256(path.name.encode()).hexdigest(),
        size_bytes=path.stat().st_size if path.exists() else 0,
        quantization="Q4_1",
        parameter_count=134_515_008,
        context_length=8192,
        architecture="llama",
        tier=Tier.MICRO,
        tags=("chat",),
    )
    return ModelSource(artifact, path, **changes)  # type: ignore[arg-type]


def gemma(path: Path, **changes: object) -> ModelSource:
    """Gemma 3 270M as a source: a sliding window, 262,144 tokens, no chat template."""
    artifact = Artifact(
        family="gemma-3-270m",
        name=path.name,
        sha256=hashlib.sha256(path.name.encode()).hexdigest(),
        size_bytes=path.stat().st_size,
        quantization="Q4_K_M",
        parameter_count=268_098_176,
        context_length=32_768,
        architecture="gemma3",
        tier=Tier.MICRO,
    )
    return ModelSource(artifact, path, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """SmolLM2 cut down to 2 of its 30 layers: for what doesn't depend on what a model says, at a tenth of the cost."""
    path = tmp_path_factory.mktemp("models") / "shallow.gguf"
    cut_layers(smollm2_path(), path, 2)
    return smollm2(path)


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma's GGUF file, put together from its packages where it isn't yet."""
    return packaged_models.gemma_path()


@pytest.fixture(scope="package", autouse=True)
def quiet() -> Iterator[None]:
    """Only warnings are logged; llama.cpp tells a hundred lines of each load."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    yield
    structlog.configure(**before)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def llama() -> AsyncIterator[LlamaEngine]:
    """An engine with SmolLM2 loaded: two slots, two places in the queue, 256 tokens of context."""
    engine = LlamaEngine([smollm2()], SETTINGS)
    await engine.start()
    await engine.load("")
    yield engine
    await engine.stop()
