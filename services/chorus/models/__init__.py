"""Models: the catalog, the folder on disk, downloads, and what a file tells of the model in it."""

from chorus.models.adapters import AdapterInfo, check_fit, read_adapter
from chorus.models.catalog import DEFAULT_MODEL, Catalog, CatalogArtifact, CatalogFamily, resolve_default
from chorus.models.gguf import GgufInfo, artifact_of, inspect
from chorus.models.memory import DEFAULT_PLAN, candidate_of, estimate, shape_of
from chorus.models.progress import ProgressCallback, PullPhase, PullProgress
from chorus.models.pull import PullOptions, pull, pull_artifact
from chorus.models.soundness import check_vocabulary
from chorus.models.sources.offer import ImportMode
from chorus.models.store import BrokenFile, Listing, ModelStore, StoredAdapter, StoredArtifact, default_models_dir

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_PLAN",
    "AdapterInfo",
    "BrokenFile",
    "Catalog",
    "CatalogArtifact",
    "CatalogFamily",
    "GgufInfo",
    "ImportMode",
    "Listing",
    "ModelStore",
    "ProgressCallback",
    "PullOptions",
    "PullPhase",
    "PullProgress",
    "StoredAdapter",
    "StoredArtifact",
    "artifact_of",
    "candidate_of",
    "check_fit",
    "check_vocabulary",
    "default_models_dir",
    "estimate",
    "inspect",
    "pull",
    "pull_artifact",
    "read_adapter",
    "resolve_default",
    "shape_of",
]
