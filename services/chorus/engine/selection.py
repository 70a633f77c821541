"""Which of an engine's models a request means, and whether that model can do what is asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from chorus.core.errors import UnknownModelError, UnsupportedFeatureError
from chorus.core.fleet.records import Feature, ModelState, ModelStatus

_ORDER = {ModelState.LOADED: 0, ModelState.LOADING: 1, ModelState.AVAILABLE: 2, ModelState.FAILED: 3}


def select_model(
    models: Sequence[ModelStatus], name: str, *, sha256: str = "", features: Iterable[Feature] = (), adapter: str = ""
) -> ModelStatus:
    """The model that `name` (an artifact's name, a family, or empty for any) and `sha256` mean.

    Of several, one that has the features and the adapter and is loaded comes first. Raises `UnknownModelError`.
    """
    needed = frozenset(features)
    named = [model for model in models if not name or name in (model.artifact.name, model.artifact.family)]
    candidates = [model for model in named if not sha256 or model.artifact.sha256 == sha256]
    if candidates:
        return min(
            candidates,
            key=lambda model: (
                not needed <= model.features,
                bool(adapter) and adapter not in model.adapters,
                _ORDER[model.state],
            ),
        )
    known = ", ".join(sorted({model.artifact.name for model in models})) or "none"
    wanted = f"no model {name!r} here" if name else "no model here"
    if named:
        wanted = f"no artifact of {name or 'any model'} with SHA-256 {sha256} here"
    raise UnknownModelError(f"{wanted}; this engine has: {known}", metadata={"model": name})


def require_features(model: ModelStatus, needed: Iterable[Feature]) -> None:
    """Raises `UnsupportedFeatureError`, which names the first missing feature, unless the model has all of them."""
    missing = sorted(frozenset(needed) - model.features)
    if missing:
        raise UnsupportedFeatureError(
            f"{model.artifact.name} on {model.engine} cannot do {', '.join(missing)}",
            metadata={"feature": missing[0], "model": model.artifact.name},
        )
