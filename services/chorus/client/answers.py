"""What the mesh answers, as plain records. Durations are seconds."""

from __future__ import annotations

from dataclasses import dataclass

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.api.inference.v1 import embedding_pb2, rerank_pb2
from chorus.api.runner.v1 import resources_pb2
from chorus.core.cache.report import CacheReport
from chorus.core.fleet.listing import NodeEntry
from chorus.core.fleet.records import Artifact, ModelStatus
from chorus.core.generation import Embedding, FinishReason, Ranked, Substitution, Timings, ToolCall, Usage
from chorus.wire.embedding import decode_embeddings
from chorus.wire.rerank import decode_ranking
from chorus.wire.resources import decode_artifact, decode_duration, decode_model_status

_REASON_PREFIX = "REJECTION_REASON_"


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """One choice of a completion, whole."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    token_ids: tuple[int, ...]
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Completion:
    """A generation, whole. `time_to_first_token_s` and `elapsed_s` are what this client saw; `timings` the runner's.

    `substitution` tells that another model answered than the one asked for, `cache` what the answer cache had to do
    with it, where it was asked.
    """

    choices: tuple[CompletionChoice, ...]
    model: str
    artifact: str
    artifact_sha256: str
    node_id: str
    runner_id: str
    request_id: str
    attempts: int
    usage: Usage
    timings: Timings
    time_to_first_token_s: float | None
    elapsed_s: float
    substitution: Substitution | None = None
    cache: CacheReport | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class EmbeddingAnswer:
    """Vectors in the order of their texts, and who made them."""

    embeddings: tuple[Embedding, ...]
    model: str
    artifact_sha256: str
    node_id: str
    runner_id: str

    @classmethod
    def decode(cls, message: embedding_pb2.EmbeddingResult) -> EmbeddingAnswer:
        """Out of its message."""
        return cls(
            decode_embeddings(message), message.model, message.artifact_sha256, message.node_id, message.runner_id
        )


@dataclass(frozen=True, slots=True)
class RerankAnswer:
    """Documents, the best one first, by their places in the request, and who scored them; `token_count` were read."""

    documents: tuple[Ranked, ...]
    token_count: int
    model: str
    artifact_sha256: str
    node_id: str
    runner_id: str

    @classmethod
    def decode(cls, message: rerank_pb2.RerankResult) -> RerankAnswer:
        """Out of its message."""
        ranking = decode_ranking(message)
        return cls(
            ranking.results,
            ranking.token_count,
            message.model,
            message.artifact_sha256,
            message.node_id,
            message.runner_id,
        )


@dataclass(frozen=True, slots=True)
class TokenCountAnswer:
    """How many tokens a prompt has for a model, and what a request may use of its context."""

    token_count: int
    context_length: int
    model: str
    artifact_sha256: str

    @classmethod
    def decode(cls, message: embedding_pb2.TokenCount) -> TokenCountAnswer:
        """Out of its message."""
        return cls(message.token_count, message.context_length, message.model, message.artifact_sha256)


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """An artifact as one runner has it."""

    node_id: str
    runner_id: str
    status: ModelStatus


@dataclass(frozen=True, slots=True)
class MeshModel:
    """An artifact, and where it is."""

    artifact: Artifact
    places: tuple[ModelPlace, ...]


@dataclass(frozen=True, slots=True)
class MeshModels:
    """Every artifact of the mesh, by family and name; `default_model` answers requests that name none (or "")."""

    models: tuple[MeshModel, ...]
    default_model: str

    @classmethod
    def decode(cls, message: pb.ListModelsResponse) -> MeshModels:
        """Out of its message."""
        return cls(tuple(_decode_model(model) for model in message.models), message.default_model)


@dataclass(frozen=True, slots=True)
class RegistrySeen:
    """A registry as the coordinator sees it; `last_heard_s` ago, None for never."""

    address: str
    connected: bool
    synced: bool
    problem: str
    last_heard_s: float | None


@dataclass(frozen=True, slots=True)
class MeshNodes:
    """The nodes that match, by id, and the registries that tell of them. `synced`: whoever is absent is really gone."""

    nodes: tuple[NodeEntry, ...]
    registries: tuple[RegistrySeen, ...]
    synced: bool


@dataclass(frozen=True, slots=True)
class CandidateRunner:
    """A runner that could serve a request; `terms` add up to its cost in seconds."""

    node_id: str
    runner_id: str
    artifact: str
    cost: float
    terms: dict[str, float]


@dataclass(frozen=True, slots=True)
class RejectedRunner:
    """A runner that can't, and why: `reason` is one of placement's, such as `context`."""

    node_id: str
    runner_id: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class PlacementExplanation:
    """Where a generation would go, cheapest first; where it would go nowhere, the error that it would end with."""

    chosen_runner_id: str
    candidates: tuple[CandidateRunner, ...]
    rejected: tuple[RejectedRunner, ...]
    error_reason: str
    error_message: str

    @classmethod
    def decode(cls, message: pb.ExplainPlacementResponse) -> PlacementExplanation:
        """Out of its message."""
        return cls(
            message.chosen_runner_id,
            tuple(
                CandidateRunner(
                    found.node_id,
                    found.runner_id,
                    found.artifact,
                    found.cost,
                    {term.name: term.value for term in found.terms},
                )
                for found in message.candidates
            ),
            tuple(
                RejectedRunner(other.node_id, other.runner_id, _reason(other.reason), other.detail)
                for other in message.rejected
            ),
            message.error_reason,
            message.error_message,
        )


def decode_registry(message: pb.RegistryStatus) -> RegistrySeen:
    """Out of its message."""
    heard = decode_duration(message.last_heard) if message.HasField("last_heard") else None
    return RegistrySeen(message.address, message.connected, message.synced, message.problem, heard)


def _decode_model(message: pb.MeshModel) -> MeshModel:
    places = []
    for place in message.places:
        # The wire leaves out of each place what it says once for all of them.
        status = resources_pb2.ModelStatus()
        status.CopyFrom(place.status)
        status.artifact.CopyFrom(message.artifact)
        places.append(ModelPlace(place.node_id, place.runner_id, decode_model_status(status)))
    return MeshModel(decode_artifact(message.artifact), tuple(places))


def _reason(value: pb.RejectionReason.ValueType) -> str:
    if value not in pb.RejectionReason.values():
        return "unknown"  # of a newer coordinator; the detail says it in words
    return pb.RejectionReason.Name(value).removeprefix(_REASON_PREFIX).lower()
