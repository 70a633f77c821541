"""How much memory a model needs once it is loaded, by the rules that llama.cpp allocates by.

    weights   the tensors' bytes; memory-mapped or repacked by the CPU backend, they are needed once
    cache     context x slots x K and V elements per token x bytes per element of the cache type
    compute   the larger of the two ends of a decode step over one batch of `batch_tokens`:
                logits: outputs x (vocabulary + 2 x embedding) x 4
                layer:  batch x (3 x feed-forward + 4 x widest of embedding and attention) x 4
                        + masks x context x batch x (2 with flash attention, else 4)
                        + heads x context x batch x 4, without flash attention only
    output    sequences x vocabulary x 4, where the logits of each sequence are kept

The compute terms were fitted to llama.cpp's own buffer sizes (tests/core/test_suggest_memory.py holds them) and err on
the high side. A model whose shape is unknown is guessed from its number of parameters, higher still.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

DEFAULT_BATCH_TOKENS = 512
_CACHE_PADDING_TOKENS = 256
_FLOAT_BYTES = 4


class CacheType(StrEnum):
    """How the keys and values of past tokens are stored."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q5_1 = "q5_1"
    Q5_0 = "q5_0"
    Q4_1 = "q4_1"
    Q4_0 = "q4_0"

    @property
    def quantized(self) -> bool:
        """Whether numbers are stored in blocks with a scale."""
        return _BLOCKS[self][1] > 1

    def bytes_of(self, elements: int) -> int:
        """Bytes that `elements` numbers take; quantized types store blocks of 32 with their scales."""
        per_block, block = _BLOCKS[self]
        return math.ceil(elements / block) * per_block


_BLOCKS = {
    CacheType.F32: (4, 1),
    CacheType.F16: (2, 1),
    CacheType.BF16: (2, 1),
    CacheType.Q8_0: (34, 32),
    CacheType.Q5_1: (24, 32),
    CacheType.Q5_0: (22, 32),
    CacheType.Q4_1: (20, 32),
    CacheType.Q4_0: (18, 32),
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions of a model that decide what it allocates. Counts of numbers, not of bytes."""

    weights_bytes: int
    embedding_length: int
    feed_forward_length: int  # of the experts used at a time, for a mixture of experts
    vocabulary_size: int
    head_count: int
    attention_width: int  # heads x length of a head
    cache_elements_per_token: int  # K and V over all layers
    mask_count: int = 1  # 2 where some layers attend to a window only
    layer_count: int = 1
    input_bytes: int = 0  # of the weights: the token embeddings
    output_bytes: int = 0  # of the weights: the matrix of the logits, 0 where it is that of the embeddings

    @classmethod
    def guess(cls, parameter_count: int, weights_bytes: int) -> ModelShape:
        """A shape for a model of which nothing but its size is known, rather too large than too small."""
        billions = max(parameter_count, 1) / 1e9
        embedding = 256 * math.ceil(6 * math.sqrt(billions) + 1)
        return cls(
            weights_bytes=weights_bytes,
            embedding_length=embedding,
            feed_forward_length=4 * embedding,
            vocabulary_size=152_000,
            head_count=max(8, embedding // 128),
            attention_width=embedding,
            cache_elements_per_token=int(8_000 + 40_000 * math.sqrt(billions)),
        )


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How a model would be loaded. `context_tokens` is what one request may use; `slots` requests run at once.

    `outputs` is the largest number of tokens of a batch whose logits are wanted; 0 reserves for all of them.
    `cache_tokens` is how many all requests share, by default what `slots` of them may use. `sequences` is how many the
    context knows, those that are only cached included; by default one a slot.
    """

    context_tokens: int
    slots: int = 1
    cache_tokens: int = 0
    sequences: int = 0
    cache_type: CacheType = CacheType.F16
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    outputs: int = 0
    flash_attention: bool = True


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that a loaded model needs, part by part."""

    weights_bytes: int
    cache_bytes: int
    compute_bytes: int
    output_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.cache_bytes + self.compute_bytes + self.output_bytes


def estimate_memory(shape: ModelShape, plan: LoadPlan) -> MemoryEstimate:
    """What `shape` needs when it is loaded as `plan` says."""
    cached_tokens = _padded(plan.cache_tokens) or _padded(plan.context_tokens) * plan.slots
    batch = min(plan.batch_tokens, cached_tokens) if cached_tokens else plan.batch_tokens
    outputs = min(plan.outputs, batch) if plan.outputs else batch
    return MemoryEstimate(
        weights_bytes=shape.weights_bytes,
        cache_bytes=plan.cache_type.bytes_of(cached_tokens * shape.cache_elements_per_token),
        compute_bytes=max(_logits_bytes(shape, outputs), _layer_bytes(shape, plan, batch, cached_tokens)),
        output_bytes=(plan.sequences or plan.slots) * shape.vocabulary_size * _FLOAT_BYTES,
    )


def _padded(tokens: int) -> int:
    return math.ceil(tokens / _CACHE_PADDING_TOKENS) * _CACHE_PADDING_TOKENS


def _logits_bytes(shape: ModelShape, outputs: int) -> int:
    return outputs * (shape.vocabulary_size + 2 * shape.embedding_length) * _FLOAT_BYTES


def _layer_bytes(shape: ModelShape, plan: LoadPlan, batch: int, cached_tokens: int) -> int:
    widest = max(shape.embedding_length, shape.attention_width)
    activations = batch * (3 * shape.feed_forward_length + 4 * widest) * _FLOAT_BYTES
    masks = shape.mask_count * cached_tokens * batch * (2 if plan.flash_attention else _FLOAT_BYTES)
    scores = 0 if plan.flash_attention else shape.head_count * cached_tokens * batch * _FLOAT_BYTES
    return activations + masks + scores
