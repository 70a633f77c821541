"""The memory estimate against the buffers that llama.cpp really allocated, and its properties over random shapes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.fitting.memory import CacheType, LoadPlan, ModelShape, estimate_memory

MIB = 1 << 20

SMOLLM2_135M = ModelShape(
    weights_bytes=96_576_768,
    embedding_length=576,
    feed_forward_length=1536,
    vocabulary_size=49_152,
    head_count=9,
    attention_width=9 * 64,
    cache_elements_per_token=30 * 3 * (64 + 64),
)
GEMMA3_270M = ModelShape(
    weights_bytes=246_587_904,
    embedding_length=640,
    feed_forward_length=2048,
    vocabulary_size=262_144,
    head_count=4,
    attention_width=4 * 256,
    cache_elements_per_token=18 * 1 * (256 + 256),
    mask_count=2,
)

# What llama-cpp-python 0.3.36 logged on a CPU, in MiB: (shape, context in all, sequences, flash attention, ubatch,
# n_outputs_max) -> KV buffer, compute buffer, output buffer.
MEASURED = [
    (SMOLLM2_135M, 512, 1, True, 512, 0, 11.25, 98.25, 0.19),
    (SMOLLM2_135M, 4096, 1, True, 512, 0, 90.00, 98.25, 0.19),
    (SMOLLM2_135M, 4096, 1, False, 512, 0, 90.00, 99.38, 0.19),
    (SMOLLM2_135M, 16384, 4, True, 512, 0, 360.00, 98.25, 0.75),
    (SMOLLM2_135M, 16384, 4, False, 512, 0, 360.00, 326.38, 0.75),
    (SMOLLM2_135M, 4096, 1, True, 128, 0, 90.00, 24.56, 0.19),
    (SMOLLM2_135M, 4096, 1, True, 2048, 0, 90.00, 393.01, 0.19),
    (SMOLLM2_135M, 16384, 4, True, 512, 4, 360.00, 29.51, 0.75),
    (GEMMA3_270M, 512, 1, True, 512, 0, 9.00, 514.50, 1.00),
    (GEMMA3_270M, 4096, 1, True, 512, 0, 72.00, 514.50, 1.00),
    (GEMMA3_270M, 16384, 4, True, 512, 0, 288.00, 515.75, 4.00),
    (GEMMA3_270M, 4096, 1, True, 128, 0, 72.00, 128.63, 1.00),
    (GEMMA3_270M, 4096, 1, True, 2048, 0, 72.00, 2058.01, 1.00),
    (GEMMA3_270M, 16384, 4, True, 512, 4, 288.00, 49.77, 4.00),
]


@pytest.mark.parametrize(
    ("shape", "context", "slots", "flash", "batch", "outputs", "cache", "compute", "output"), MEASURED
)
def test_estimates_are_within_ten_percent_of_what_llama_cpp_allocates(
    shape: ModelShape,
    context: int,
    slots: int,
    flash: bool,
    batch: int,
    outputs: int,
    cache: float,
    compute: float,
    output: float,
) -> None:
    plan = LoadPlan(context // slots, slots, batch_tokens=batch, outputs=outputs, flash_attention=flash)
    estimate = estimate_memory(shape, plan)
    assert estimate.cache_bytes == cache * MIB
    assert estimate.output_bytes / MIB == pytest.approx(output, abs=0.01)
    measured = (cache + compute + output) * MIB
    estimated = estimate.total_bytes - estimate.weights_bytes
    assert estimated == pytest.approx(measured, rel=0.1)
    assert estimate.compute_bytes == pytest.approx(compute * MIB, rel=0.1)


def test_quantized_caches_count_their_scales() -> None:
    assert CacheType.F16.bytes_of(64) == 128
    assert CacheType.Q8_0.bytes_of(64) == 2 * 34
    assert CacheType.Q4_0.bytes_of(64) == 2 * 18
    assert CacheType.Q8_0.bytes_of(33) == 2 * 34, "a block that is begun is a block"


def test_a_context_is_padded_to_whole_blocks() -> None:
    short, padded = (estimate_memory(SMOLLM2_135M, LoadPlan(tokens)).cache_bytes for tokens in (1, 256))
    assert short == padded > 0


SHAPES = st.builds(
    ModelShape,
    weights_bytes=st.integers(0, 1 << 40),
    embedding_length=st.integers(1, 20_000),
    feed_forward_length=st.integers(1, 100_000),
    vocabulary_size=st.integers(0, 500_000),
    head_count=st.integers(1, 256),
    attention_width=st.integers(1, 40_000),
    cache_elements_per_token=st.integers(0, 1 << 20),
    mask_count=st.integers(1, 2),
)
PLANS = st.builds(
    LoadPlan,
    context_tokens=st.integers(1, 1 << 20),
    slots=st.integers(1, 64),
    cache_type=st.sampled_from(CacheType),
    batch_tokens=st.integers(1, 4096),
    outputs=st.integers(0, 4096),
    flash_attention=st.booleans(),
)


@given(SHAPES, PLANS, st.sampled_from(["context_tokens", "slots", "batch_tokens"]), st.integers(1, 100))
def test_asking_for_more_never_needs_less(shape: ModelShape, plan: LoadPlan, what: str, more: int) -> None:
    larger = dataclasses.replace(plan, **{what: getattr(plan, what) + more})
    assert estimate_memory(shape, larger).total_bytes >= estimate_memory(shape, plan).total_bytes


@given(SHAPES, PLANS)
def test_every_part_counts_and_weights_count_once(shape: ModelShape, plan: LoadPlan) -> None:
    estimate = estimate_memory(shape, plan)
    parts = (estimate.weights_bytes, estimate.cache_bytes, estimate.compute_bytes, estimate.output_bytes)
    assert all(part >= 0 for part in parts)
    assert estimate.total_bytes == sum(parts)
    assert estimate.weights_bytes == shape.weights_bytes


@given(st.integers(1, 10**12), st.integers(1, 1 << 42), PLANS)
def test_a_guess_grows_with_the_model(parameters: int, weights: int, plan: LoadPlan) -> None:
    smaller = estimate_memory(ModelShape.guess(parameters, weights), plan)
    larger = estimate_memory(ModelShape.guess(2 * parameters, weights), plan)
    assert larger.total_bytes >= smaller.total_bytes
