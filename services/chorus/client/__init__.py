"""The Python client: the only way in for everything above the wire.

async with MeshClient.from_config(load_config()) as mesh:
    async for event in mesh.generate("Why is the sky blue?"):
        ...
"""

from chorus.client.answers import (
    CandidateRunner,
    Completion,
    CompletionChoice,
    EmbeddingAnswer,
    MeshModel,
    MeshModels,
    MeshNodes,
    ModelPlace,
    PlacementExplanation,
    RegistrySeen,
    RejectedRunner,
    RerankAnswer,
    TokenCountAnswer,
)
from chorus.client.caching import MeshCache
from chorus.client.costs import Budget, MeshCosts
from chorus.client.ensembles import (
    EnsembleCompletion,
    EnsembleEvent,
    EnsembleGeneration,
    EnsembleRestarted,
    MemberEvent,
    ensemble_spec,
)
from chorus.client.events import CoordinatorLost, CoordinatorWatched, EventNews, EventsMissing, SeenEvent
from chorus.client.learning import MeshLearning
from chorus.client.mesh import MeshClient
from chorus.client.requests import chat_request
from chorus.client.statistics import MeshStats
from chorus.client.stream import Generation
from chorus.client.sync import SyncGeneration, SyncMeshClient
from chorus.core.cache.policy import CacheMode
from chorus.core.cache.report import CacheOutcome, CacheReport
from chorus.core.ensemble.records import EnsembleSpec, MemberSpec, Verdict
from chorus.core.generation import Fallback, Substitution
from chorus.wire.events import AttemptChanged, ClientEvent, Origin, StartedAt

__all__ = [
    "AttemptChanged",
    "Budget",
    "CacheMode",
    "CacheOutcome",
    "CacheReport",
    "CandidateRunner",
    "ClientEvent",
    "Completion",
    "CompletionChoice",
    "CoordinatorLost",
    "CoordinatorWatched",
    "EmbeddingAnswer",
    "EnsembleCompletion",
    "EnsembleEvent",
    "EnsembleGeneration",
    "EnsembleRestarted",
    "EnsembleSpec",
    "EventNews",
    "EventsMissing",
    "Fallback",
    "Generation",
    "MemberEvent",
    "MemberSpec",
    "MeshCache",
    "MeshClient",
    "MeshCosts",
    "MeshLearning",
    "MeshModel",
    "MeshModels",
    "MeshNodes",
    "MeshStats",
    "ModelPlace",
    "Origin",
    "PlacementExplanation",
    "RegistrySeen",
    "RejectedRunner",
    "RerankAnswer",
    "SeenEvent",
    "StartedAt",
    "Substitution",
    "SyncGeneration",
    "SyncMeshClient",
    "TokenCountAnswer",
    "Verdict",
    "chat_request",
    "ensemble_spec",
]
