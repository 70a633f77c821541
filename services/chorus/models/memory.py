"""From a model file, or a catalog's entry, to the memory that it needs: what `core.fitting` decides with."""

from __future__ import annotations

from chorus.core.fitting.memory import LoadPlan, MemoryEstimate, ModelShape, estimate_memory
from chorus.core.fitting.suggest import Candidate
from chorus.models.catalog import CatalogArtifact, CatalogFamily
from chorus.models.gguf import GgufInfo

DEFAULT_PLAN = LoadPlan(context_tokens=4096, slots=4)
"""How a runner loads a model unless it is told otherwise."""


def shape_of(info: GgufInfo) -> ModelShape:
    """The dimensions of a file's model; guessed from its size where the file doesn't tell them."""
    if not (info.embedding_length and info.vocabulary_size and info.layer_count):
        return ModelShape.guess(info.parameter_count, info.tensor_bytes)
    cached = sum(info.kv_head_counts) * (info.key_length + info.value_length) if info.causal else 0
    return ModelShape(
        weights_bytes=info.tensor_bytes,
        embedding_length=info.embedding_length,
        feed_forward_length=info.feed_forward_length or 4 * info.embedding_length,
        vocabulary_size=info.vocabulary_size if info.causal else 0,
        head_count=info.head_count,
        attention_width=info.head_count * info.key_length,
        cache_elements_per_token=cached,
        mask_count=2 if info.sliding_window else 1,
        layer_count=info.layer_count,
        input_bytes=info.input_bytes,
        output_bytes=info.output_bytes,
    )


def estimate(info: GgufInfo, plan: LoadPlan = DEFAULT_PLAN) -> MemoryEstimate:
    """What a file needs when it is loaded as `plan` says."""
    return estimate_memory(shape_of(info), plan)


def candidate_of(family: CatalogFamily, artifact: CatalogArtifact, plan: LoadPlan = DEFAULT_PLAN) -> Candidate:
    """A catalog's entry as something that could be loaded, with no more context than it was trained for."""
    plan = LoadPlan(
        context_tokens=min(plan.context_tokens, family.context_length),
        slots=plan.slots,
        cache_type=plan.cache_type,
        batch_tokens=plan.batch_tokens,
        outputs=plan.outputs,
        flash_attention=plan.flash_attention,
    )
    return Candidate(
        family=family.name,
        artifact=artifact.name,
        quantization=artifact.quantization,
        parameter_count=family.parameter_count,
        size_bytes=artifact.size_bytes,
        tier=family.tier,
        tags=family.tags,
        context_tokens=plan.context_tokens,
        memory=estimate_memory(_catalog_shape(family, artifact), plan),
    )


def _catalog_shape(family: CatalogFamily, artifact: CatalogArtifact) -> ModelShape:
    shape = family.shape
    if shape is None:
        return ModelShape.guess(family.parameter_count, artifact.size_bytes)
    heads_length = shape.kv_heads * shape.head_length
    causal = "embedding" not in family.tags
    return ModelShape(
        weights_bytes=artifact.size_bytes,
        embedding_length=shape.embedding_length,
        feed_forward_length=shape.feed_forward_length,
        vocabulary_size=shape.vocabulary_size if causal else 0,
        head_count=shape.heads,
        attention_width=shape.heads * shape.head_length,
        cache_elements_per_token=2 * shape.layers * heads_length if causal else 0,
        mask_count=1,
    )
