"""Reranking: between `chorus.api.inference.v1` and `chorus.core.generation`."""

from __future__ import annotations

from chorus.api.inference.v1 import rerank_pb2 as pb
from chorus.core.errors import InvalidRequestError
from chorus.core.fleet.records import Artifact
from chorus.core.generation import Ranked, Ranking, RerankRequest, Usage
from chorus.wire.embedding import MAX_INPUTS, TRUNCATIONS, decode_truncation
from chorus.wire.events import encode_usage
from chorus.wire.generation import PRIORITIES, decode_priority, decode_requirements, encode_requirements


def decode_rerank(message: pb.RerankSpec) -> RerankRequest:
    """A checked request. Raises `InvalidRequestError`."""
    if not message.query:
        raise InvalidRequestError("query", "must not be empty")
    if not 1 <= len(message.documents) <= MAX_INPUTS:
        count = len(message.documents)
        raise InvalidRequestError("documents", f"has {count} documents, but must have 1 to {MAX_INPUTS}")
    top_n = message.top_n if message.HasField("top_n") else None
    if top_n == 0:
        raise InvalidRequestError("top_n", "must be at least 1; leave it out to be told of every document")
    return RerankRequest(
        model=message.model,
        query=message.query,
        documents=tuple(message.documents),
        top_n=top_n,
        truncate=decode_truncation(message.truncation),
        priority=decode_priority("priority", message.priority),
        requirements=decode_requirements(message.requirements),
    )


def encode_rerank(request: RerankRequest) -> pb.RerankSpec:
    """The message of a request; decoding it gives an equal one."""
    return pb.RerankSpec(
        model=request.model,
        query=request.query,
        documents=request.documents,
        top_n=request.top_n,
        truncation=TRUNCATIONS[request.truncate],
        requirements=encode_requirements(request.requirements),
        priority=PRIORITIES[request.priority],
    )


def encode_ranking(artifact: Artifact, ranking: Ranking, *, node_id: str, runner_id: str) -> pb.RerankResult:
    """The documents in order, with who scored them."""
    return pb.RerankResult(
        documents=[
            pb.RankedDocument(index=ranked.index, score=ranked.score, truncated=ranked.truncated)
            for ranked in ranking.results
        ],
        node_id=node_id,
        runner_id=runner_id,
        model=artifact.family,
        artifact_sha256=artifact.sha256,
        usage=encode_usage(Usage(prompt_tokens=ranking.token_count, cached_tokens=0, completion_tokens=0)),
    )


def decode_ranking(message: pb.RerankResult) -> Ranking:
    """The documents, in order, and how many tokens were read."""
    results = tuple(Ranked(ranked.index, ranked.score, ranked.truncated) for ranked in message.documents)
    return Ranking(results, message.usage.prompt_token_count)
