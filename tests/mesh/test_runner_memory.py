"""What a runner is configured with, as its engine does it: memory, pinned models, GPUs, damaged files."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from chorus.config import RunnerSettings
from chorus.core.errors import ConfigError, OutOfMemoryError, UnknownModelError
from chorus.core.fitting.memory import CacheType
from chorus.engine.llama import LlamaEngine
from chorus.runner.engines import HostedEngine, llama_engine
from chorus.testing.packaged_models import smollm2_path

GIB = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "models"
    place.mkdir()
    (place / smollm2_path().name).symlink_to(smollm2_path())
    return place


def hosted(folder: Path, **settings: object) -> HostedEngine:
    return llama_engine(RunnerSettings(models_dir=folder, threads=1, context_length=256, slots=1, **settings))  # type: ignore[arg-type]


async def test_a_limit_that_is_too_low_is_said_with_its_key(folder: Path) -> None:
    engine = hosted(folder, memory_limit_gib=0.01).engine
    await engine.start()
    try:
        with pytest.raises(OutOfMemoryError, match=r"may take 10 MiB \(runner\.memory_limit_gib\).*raise that limit"):
            await engine.load("smollm2-135m-instruct")
    finally:
        await engine.stop()


async def test_a_reserve_that_leaves_nothing_is_said_with_its_key(folder: Path) -> None:
    engine = hosted(folder, memory_reserve_gib=60_000).engine
    await engine.start()
    try:
        with pytest.raises(OutOfMemoryError, match=r"runner\.memory_reserve_gib.*lower that reserve"):
            await engine.load("smollm2-135m-instruct")
    finally:
        await engine.stop()


async def test_what_is_configured_reaches_the_engine(folder: Path) -> None:
    engine = hosted(
        folder,
        memory_reserve_gib=0.5,
        max_loaded_models=3,
        max_decoding_models=2,
        keep_alive_s=60,
        pinned="smollm2-135m-instruct",
        kv_tokens=1024,
        cache_type="q8_0",
    ).engine
    assert isinstance(engine, LlamaEngine)
    settings = engine._settings
    assert (settings.kv_tokens, settings.cache_type) == (1024, CacheType.Q8_0)
    residency = settings.residency
    assert (residency.reserve_bytes, residency.limit_bytes) == (GIB // 2, None)
    assert (residency.max_loaded, residency.max_decoding, residency.keep_alive_s) == (3, 2, 60)
    assert residency.pinned == {"SmolLM2-135M-Instruct.Q4_1"}


def test_a_gpu_that_is_not_there_is_an_error(folder: Path) -> None:
    for settings in ({"gpu_policy": "CUDA99=reserved"}, {"gpu_assignments": "smollm2-135m-instruct=CUDA99+CUDA98"}):
        with pytest.raises(ConfigError, match="no graphics device CUDA9"):
            hosted(folder, **settings)


async def test_a_file_that_would_end_the_process_is_not_offered(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "twice.Q8_0.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["same", "same"])
    writer.add_tensor("token_embd.weight", np.ones((2, 64), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    engine = hosted(folder).engine
    await engine.start()
    try:
        assert [status.artifact.name for status in engine.models()] == ["SmolLM2-135M-Instruct.Q4_1"]
        with pytest.raises(UnknownModelError):
            await engine.load("twice")
    finally:
        await engine.stop()
