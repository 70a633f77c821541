"""Requests out of what people have at hand: a question, a conversation, or the whole request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from chorus.core.generation import (
    Conversation,
    EmbeddingRequest,
    GenerationRequest,
    Message,
    MessageRole,
    Requirements,
    RerankRequest,
    Sampling,
    TextPart,
)

Asked: TypeAlias = str | Sequence[Message] | GenerationRequest
"""A question, the turns of a conversation, or a whole request."""


def chat_request(
    asked: Asked,
    *,
    model: str = "",
    instructions: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    adapter: str = "",
    requirements: Requirements | None = None,
) -> GenerationRequest:
    """The request that `asked` means. `model` empty: the mesh's default; `instructions` come before the conversation.

    `adapter` is the name of a LoRA adapter for this generation alone (`chorus status` shows those there are).

    What is given beside a whole request replaces what it says; instructions are for the other forms alone.
    """
    if isinstance(asked, GenerationRequest):
        if instructions:
            raise TypeError("instructions come with a question or a conversation; a whole request holds its own")
        request = asked
    else:
        turns = (_turn(MessageRole.USER, asked),) if isinstance(asked, str) else tuple(asked)
        opening = (_turn(MessageRole.SYSTEM, instructions),) if instructions else ()
        request = GenerationRequest(model=model, prompt=Conversation((*opening, *turns)))
    sampling, stop = request.sampling, request.stop
    return replace(
        request,
        model=model or request.model,
        sampling=_sampling(sampling, temperature, seed),
        stop=stop if max_tokens is None else replace(stop, max_tokens=max_tokens),
        adapter=adapter or request.adapter,
        requirements=request.requirements if requirements is None else requirements,
    )


def embedding_request(asked: str | Sequence[str] | EmbeddingRequest, model: str) -> EmbeddingRequest:
    """The request that embeds a text, several, or is whole already."""
    if isinstance(asked, EmbeddingRequest):
        return replace(asked, model=model) if model else asked
    return EmbeddingRequest(model=model, inputs=(asked,) if isinstance(asked, str) else tuple(asked))


def rerank_request(
    query: str | RerankRequest, documents: Sequence[str], model: str, top_n: int | None
) -> RerankRequest:
    """The request that orders documents, or is whole already; what is given beside that replaces what it says."""
    if not isinstance(query, RerankRequest):
        return RerankRequest(model, query, tuple(documents), top_n)
    if documents:
        raise TypeError("documents come with a query; a whole request holds its own")
    return replace(query, model=model or query.model, top_n=query.top_n if top_n is None else top_n)


def _turn(role: MessageRole, text: str) -> Message:
    return Message(role, (TextPart(text),))


def _sampling(sampling: Sampling, temperature: float | None, seed: int | None) -> Sampling:
    if temperature is not None:
        sampling = replace(sampling, temperature=temperature)
    return sampling if seed is None else replace(sampling, seed=seed)
