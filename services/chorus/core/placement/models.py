"""What the mesh has, by model: the names for a message, and the model of requests that name none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from chorus.core.fleet.directory import Directory
from chorus.core.fleet.records import EngineKind, Feature, ModelState, ModelStatus, RunnerState
from chorus.core.placement.fit import NOT_GENERATING_TAGS
from chorus.core.placement.needs import Work

_FEATURE_OF = {Work.EMBED: Feature.EMBED, Work.RERANK: Feature.RERANK}


def families(directory: Directory) -> tuple[str, ...]:
    """The model families of the mesh, by name."""
    return tuple(sorted({status.artifact.family for status in _statuses(directory)}))


def artifacts_of(directory: Directory, model: str) -> tuple[str, ...]:
    """The SHA-256 of every file that goes by this name, a family's or an artifact's own; of every file for ""."""
    return tuple(
        {
            status.artifact.sha256: None
            for status in _statuses(directory)
            if status.artifact.sha256 and model in ("", status.artifact.family, status.artifact.name)
        }
    )


def default_model(directory: Directory, work: Work = Work.GENERATE, configured: str | None = None) -> str:
    """The family that answers requests which name no model; empty where there is none.

    `configured` where it is set (for generations; vectors and scores need other models). Else the family that most
    runners have loaded; of equals the one that most runners have at all, then the one with the most parameters, then
    the first by name. Only models that chat count, unless none does; models of paid providers don't count.
    """
    if configured and work not in _FEATURE_OF:
        return configured
    external = {
        (entry.record.runner.runner_id, engine.name)
        for entry in directory.entries.values()
        for engine in entry.record.runner.engines
        if engine.kind is EngineKind.EXTERNAL
    }
    found = [
        (entry, status)
        for entry in directory.entries.values()
        for status in entry.record.runner.models
        if status.state is not ModelState.FAILED
        and entry.record.state is not RunnerState.DRAINING
        and (entry.record.runner.runner_id, status.engine) not in external
        and _does(status, work)
    ]
    chatting = [(entry, status) for entry, status in found if Feature.CHAT in status.features]
    statuses = [status for _, status in (chatting or found)]
    if not statuses:
        return ""
    had = Counter(status.artifact.family for status in statuses)
    loaded = Counter(status.artifact.family for status in statuses if status.state is ModelState.LOADED)
    size = {status.artifact.family: status.artifact.parameter_count for status in statuses}
    return min(had, key=lambda family: (-loaded[family], -had[family], -size[family], family))


def _does(status: ModelStatus, work: Work) -> bool:
    if work in _FEATURE_OF:
        return _FEATURE_OF[work] in status.features
    return NOT_GENERATING_TAGS.isdisjoint(status.artifact.tags)


def _statuses(directory: Directory) -> Iterable[ModelStatus]:
    return (status for entry in directory.entries.values() for status in entry.record.runner.models)
