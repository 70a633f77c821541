"""Embeddings and token counts: between `chorus.api.inference.v1` and `chorus.core.generation`."""

from __future__ import annotations

from collections.abc import Sequence

from chorus.api.inference.v1 import embedding_pb2 as pb
from chorus.core.errors import InvalidRequestError
from chorus.core.fleet.records import Artifact, ModelStatus
from chorus.core.generation import Embedding, EmbeddingRequest, Usage
from chorus.wire.events import encode_usage
from chorus.wire.generation import PRIORITIES, decode_priority, decode_requirements, encode_requirements

MAX_INPUTS = 2048

TRUNCATIONS: dict[str | None, pb.Truncation.ValueType] = {
    None: pb.TRUNCATION_REFUSE,
    "end": pb.TRUNCATION_END,
    "start": pb.TRUNCATION_START,
}
_TRUNCATIONS_BACK = {value: key for key, value in TRUNCATIONS.items()} | {pb.TRUNCATION_UNSPECIFIED: None}


def decode_embedding(message: pb.EmbeddingSpec) -> EmbeddingRequest:
    """A checked request. Raises `InvalidRequestError`."""
    if not 1 <= len(message.inputs) <= MAX_INPUTS:
        raise InvalidRequestError("inputs", f"has {len(message.inputs)} texts, but must have 1 to {MAX_INPUTS}")
    return EmbeddingRequest(
        model=message.model,
        inputs=tuple(_decode_input(index, item) for index, item in enumerate(message.inputs)),
        normalize=message.normalize if message.HasField("normalize") else True,
        truncate=decode_truncation(message.truncation),
        priority=decode_priority("priority", message.priority),
        requirements=decode_requirements(message.requirements),
    )


def decode_truncation(value: pb.Truncation.ValueType) -> str | None:
    """Which end of a text may be cut off, if any. Raises `InvalidRequestError`."""
    if value not in _TRUNCATIONS_BACK:
        raise InvalidRequestError("truncation", f"{value} is not a way that this version knows")
    return _TRUNCATIONS_BACK[value]


def _decode_input(index: int, message: pb.EmbeddingInput) -> str | tuple[int, ...]:
    match message.WhichOneof("input"):
        case "text":
            return message.text
        case "token_ids":
            if not message.token_ids.ids:
                raise InvalidRequestError(f"inputs[{index}].token_ids", "must hold at least one token")
            return tuple(message.token_ids.ids)
        case _:
            raise InvalidRequestError(f"inputs[{index}]", "must be text or token_ids")


def encode_embedding(request: EmbeddingRequest) -> pb.EmbeddingSpec:
    """The message of a request; decoding it gives an equal one."""
    message = pb.EmbeddingSpec(
        model=request.model,
        normalize=request.normalize,
        truncation=TRUNCATIONS[request.truncate],
        priority=PRIORITIES[request.priority],
        requirements=encode_requirements(request.requirements),
    )
    for item in request.inputs:
        if isinstance(item, str):
            message.inputs.add(text=item)
        else:
            message.inputs.add().token_ids.ids.extend(item)
    return message


def encode_embedding_result(
    artifact: Artifact, embeddings: Sequence[Embedding], *, node_id: str, runner_id: str
) -> pb.EmbeddingResult:
    """The vectors with who made them; usage follows from their token counts."""
    tokens = sum(embedding.token_count for embedding in embeddings)
    return pb.EmbeddingResult(
        embeddings=[
            pb.Embedding(values=embedding.values, token_count=embedding.token_count, truncated=embedding.truncated)
            for embedding in embeddings
        ],
        node_id=node_id,
        runner_id=runner_id,
        model=artifact.family,
        artifact_sha256=artifact.sha256,
        usage=encode_usage(Usage(prompt_tokens=tokens, cached_tokens=0, completion_tokens=0)),
    )


def decode_embeddings(message: pb.EmbeddingResult) -> tuple[Embedding, ...]:
    """The vectors, in order."""
    return tuple(
        Embedding(tuple(embedding.values), embedding.token_count, embedding.truncated)
        for embedding in message.embeddings
    )


def encode_token_count(status: ModelStatus, token_count: int) -> pb.TokenCount:
    """How many tokens a prompt has for a model."""
    return pb.TokenCount(
        token_count=token_count,
        context_length=status.context_length,
        model=status.artifact.family,
        artifact_sha256=status.artifact.sha256,
    )
