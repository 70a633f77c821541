"""Whether a mesh answers: the one question whose answer makes `chorus up` say that it is ready."""

from __future__ import annotations

import asyncio

from chorus.client import MeshClient, MeshModel, MeshModels
from chorus.config import ChorusConfig
from chorus.core.errors import ChorusError, EngineError, RunnersUnavailableError, UnavailableError, UnknownModelError
from chorus.core.fleet.records import Feature, ModelState
from chorus.local.supervisor import FirstAnswer

_PATIENCE_S = 20.0
_ASK_INTERVAL_S = 0.05
# What is true for a moment while runners register and the coordinator hears of them.
_NOT_YET = (UnavailableError, RunnersUnavailableError, UnknownModelError)


def first_answer(config: ChorusConfig) -> FirstAnswer:
    """Returns what asks the mesh for one token, and then tells the names of its models.

    It raises EngineError where a model could not be loaded, or the error of the last try where none came in time.
    """

    async def ask() -> tuple[str, ...]:
        async with MeshClient.from_config(config) as mesh:
            give_up = asyncio.get_running_loop().time() + _PATIENCE_S
            while True:
                try:
                    models = await mesh.list_models()
                    await _ask_one(mesh, models)
                    return tuple(dict.fromkeys(model.artifact.name for model in models.models))
                except _NOT_YET:
                    if asyncio.get_running_loop().time() > give_up:
                        raise
                await asyncio.sleep(_ASK_INTERVAL_S)

    return ask


async def _ask_one(mesh: MeshClient, models: MeshModels) -> None:
    loaded = [model for model in models.models if any(p.status.state is ModelState.LOADED for p in model.places)]
    if not loaded:
        raise _nothing_loaded(models)
    talking = next((model for model in loaded if _can(model, Feature.CHAT)), None)
    if talking is not None:
        await mesh.complete("Say yes.", model=talking.artifact.name, max_tokens=1)
    else:
        await mesh.embed("yes", model=loaded[0].artifact.name)


def _nothing_loaded(models: MeshModels) -> ChorusError:
    errors = [place.status.error for model in models.models for place in model.places if place.status.error]
    if errors:
        return EngineError(f"no runner could load its model: {errors[0]}")
    return UnknownModelError("no runner has loaded a model yet")


def _can(model: MeshModel, feature: Feature) -> bool:
    return any(feature in place.status.features for place in model.places)
