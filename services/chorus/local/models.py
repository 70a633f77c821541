"""The models of a local mesh: those that are here, and those that have to be fetched first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from chorus.config import RunnerSettings
from chorus.core.errors import UnknownModelError
from chorus.models import Catalog, ModelStore, ProgressCallback, StoredArtifact, pull_artifact, resolve_default

WatchPull = Callable[[str], AbstractContextManager[ProgressCallback]]


def ensure_models(names: Sequence[str] | None, settings: RunnerSettings, watch: WatchPull) -> list[StoredArtifact]:
    """Returns the models called `names` (None: the catalog's default), fetched into the runner's folder where missing.

    Each name is one that the folder knows, one of the catalog, or a source such as `hf:OWNER/REPO/FILE.gguf`. `watch`
    is entered around each fetch and gets its progress. Raises UnknownModelError, DownloadError, ModelFileError.
    """
    catalog = Catalog.load([Path(text).expanduser() for text in settings.catalogs])
    store = ModelStore.open(settings.models_dir)
    if names is None:
        names = [resolve_default(catalog)[0].name]
    return [_here(name, store) or _fetch(name, store, catalog, watch) for name in names]


def _here(name: str, store: ModelStore) -> StoredArtifact | None:
    try:
        return store.find(name)
    except UnknownModelError:
        return None


def _fetch(name: str, store: ModelStore, catalog: Catalog, watch: WatchPull) -> StoredArtifact:
    with watch(name) as progress:
        return pull_artifact(name, store, progress, catalog=catalog)
