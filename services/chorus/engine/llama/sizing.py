"""What the engine asks llama.cpp for, and what that takes of memory: in one place, so that the two agree."""

from __future__ import annotations

from dataclasses import replace

from chorus.core.fitting.memory import LoadPlan, ModelShape
from chorus.core.residency.allocation import Wish
from chorus.core.residency.footprint import footprint
from chorus.engine.llama.context import ContextParams
from chorus.engine.llama.settings import LlamaSettings, ModelSource

SCORED_ROWS = 32  # positions of prompts scored, or guesses checked, in one batch


def context_params(settings: LlamaSettings, context_length: int, *, shares_prefixes: bool = True) -> ContextParams:
    """The context in which a model's requests, of at most `context_length` tokens each, are decoded.

    Where a model's memory is a state or a window it does not share prefixes: each sequence that is kept has its own.
    """
    batch = max(settings.batch_tokens, settings.slots)
    return ContextParams(
        cells=max(settings.kv_tokens or settings.slots * context_length, context_length, settings.slots),
        batch_tokens=batch,
        micro_batch_tokens=settings.micro_batch_tokens or batch,
        sequences=settings.slots,
        kept=settings.kept_sequences if shares_prefixes else min(settings.kept_sequences, settings.slots),
        outputs=max(settings.slots, SCORED_ROWS),
        threads=settings.thread_count(),
        threads_batch=settings.thread_count(),
        flash_attention=settings.flash_attention,
        cache_type=settings.cache_type,
    )


def load_plan(params: ContextParams) -> LoadPlan:
    """A context's parameters as the memory estimate knows them."""
    sequences = params.sequences + params.kept
    return LoadPlan(
        context_tokens=params.cells,
        cache_tokens=params.cells,
        sequences=sequences,
        cache_type=params.cache_type,
        batch_tokens=params.micro_batch_tokens,
        outputs=max(params.outputs, sequences),
        flash_attention=params.flash_attention,
    )


def shape_of(source: ModelSource) -> ModelShape:
    """The source's shape, guessed where it tells none."""
    artifact = source.artifact
    return source.shape or ModelShape.guess(artifact.parameter_count, artifact.size_bytes)


def wish_of(source: ModelSource, settings: LlamaSettings, context_length: int) -> Wish:
    """How a model is to be loaded for requests of at most `context_length` tokens, and what it takes.

    `settings` are the engine's; what was tuned for the model is added here.
    """
    artifact, residency = source.artifact, settings.residency
    names = {artifact.name, artifact.family}
    assigned = [devices for name, devices in residency.assignments.items() if name in names]
    params = context_params(settings.tuned(source.tuned), context_length)
    taken = footprint(shape_of(source), load_plan(params))
    if source.draft is not None and settings.speculation:
        draft = footprint(shape_of(source.draft), load_plan(draft_params(params)))
        taken = replace(taken, companion_bytes=draft.total_bytes)
    return Wish(
        name=artifact.name,
        family=artifact.family,
        footprint=taken,
        context_length=context_length,
        gpu_layers=settings.gpu_layers,
        only_on=frozenset(device for devices in assigned for device in devices) if assigned else None,
        pinned=bool(names & residency.pinned),
    )


def draft_params(params: ContextParams) -> ContextParams:
    """The context of a model that drafts for one with `params`."""
    return replace(params, kept=0)
