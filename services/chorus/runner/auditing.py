"""What a runner notes in its audit log: which models came into memory and left it, and who asked for that."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from chorus.core.audit import DeedKind, Trail
from chorus.core.fleet.records import ModelState, ModelStatus
from chorus.transport.peer import current_caller

_NAME_MAX = 100


class Auditing:
    """Notes deeds in a trail. `runner` is this runner's SPIFFE id; `models` are those of its engine as they stand."""

    def __init__(self, trail: Trail, runner: str, models: Callable[[], Iterable[ModelStatus]]) -> None:
        self._trail = trail
        self._runner = runner
        self._models = models
        self._loaded: dict[str, str] = {}

    def asked(self, kind: DeedKind, model: str) -> None:
        """The caller of the current call wants a model loaded or unloaded."""
        self._trail.note(kind, by=str(current_caller() or ""), target=model[:_NAME_MAX])

    def look(self) -> None:
        """Models may have changed, for whatever reason: asked for, needed by a request, or making room for another."""
        now = {
            model.artifact.name: model.artifact.sha256 for model in self._models() if model.state is ModelState.LOADED
        }
        for kind, one, other in (
            (DeedKind.MODEL_UNLOADED, self._loaded, now),
            (DeedKind.MODEL_LOADED, now, self._loaded),
        ):
            for name, sha256 in one.items():
                if other.get(name) != sha256:
                    self._trail.note(kind, by=self._runner, target=name, sha256=sha256)
        self._loaded = now
