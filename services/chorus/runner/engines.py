"""What engine a runner hosts, by its configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from chorus.config import RunnerSettings
from chorus.config.remote import RemoteServer
from chorus.core.errors import ChorusError, UnknownModelError
from chorus.core.fitting.memory import LoadPlan
from chorus.core.resilience.stuck import Patience
from chorus.engine.base import Engine
from chorus.engine.remote import RemoteEngine, RemoteSettings, read_api_key
from chorus.hardware import GpuSupport
from chorus.models import (
    DEFAULT_MODEL,
    Listing,
    ModelStore,
    StoredAdapter,
    StoredArtifact,
    check_fit,
    estimate,
    read_adapter,
)
from chorus.telemetry.logs import get_logger

_DEFAULT_CONTEXT = 4096
_GPU_FIX = "this build of llama.cpp cannot use it; run CHORUS_LLAMA_BACKEND=cuda make setup (or =vulkan) to build one"

_log = get_logger()


@dataclass(frozen=True, slots=True)
class HostedEngine:
    """An engine, not yet started, with the models that are loaded at the start and what it can do with GPUs.

    `refresh` makes the running engine look again for models that have come or gone; called now and then. `broken`
    returns, while the engine runs, once this process has to be started again; called once.
    """

    engine: Engine
    models: tuple[str, ...] = ()
    gpu_support: GpuSupport | None = None
    refresh: Callable[[], Awaitable[None]] | None = None
    broken: Callable[[], Awaitable[ChorusError]] | None = None


EngineFactory: TypeAlias = Callable[[RunnerSettings], HostedEngine]
"""Makes the engine that a runner was configured with. May take long: it is called on a thread of its own."""


def configured_engine(settings: RunnerSettings) -> HostedEngine:
    """The server that the runner was pointed at, or else llama.cpp in this process. Raises ConfigError."""
    return llama_engine(settings) if settings.remote is None else remote_engine(settings, settings.remote)


def remote_engine(settings: RunnerSettings, server: RemoteServer) -> HostedEngine:
    """A model server behind HTTP. Of its models, those that were asked for are loaded at the start."""
    key_file = settings.remote_api_key_file
    engine = RemoteEngine(
        RemoteSettings(
            server=server,
            api_key="" if key_file is None else read_api_key(key_file),
            slots=settings.slots,
            max_queue=settings.max_queue,
            context_length=settings.context_length,
        )
    )
    if server.is_plaintext:
        _log.warning(
            "remote.plaintext", server=str(server), why="prompts cross a network unencrypted; none that are private"
        )
    return HostedEngine(engine, models=settings.models or ())


def llama_engine(settings: RunnerSettings) -> HostedEngine:
    """llama.cpp in this process, with every sound model of the models folder. Raises ConfigError where it can't be."""
    # Imported when used: a machine without the binding runs other engines.
    from chorus.engine.llama import AdapterSource, LlamaEngine, LlamaSettings, ModelSource, binding

    context_length = settings.context_length or _DEFAULT_CONTEXT
    store = ModelStore.open(settings.models_dir)
    told: set[tuple[str, str]] = set()

    def adapter(found: StoredAdapter, stored: StoredArtifact) -> AdapterSource:
        info = found.info
        return AdapterSource(
            info.name,
            info.path,
            info.size_bytes,
            found.stamp,
            check=lambda: check_fit(read_adapter(info.path), stored.info),
        )

    def needed_bytes(stored: StoredArtifact) -> int:
        own_limit = stored.info.context_length or context_length
        plan = LoadPlan(context_tokens=min(context_length, own_limit), slots=settings.slots)
        return estimate(stored.info, plan).total_bytes

    def draft_of(stored: StoredArtifact, listing: Listing) -> StoredArtifact | None:
        artifact = stored.artifact
        named = settings.draft_models.get(artifact.name) or settings.draft_models.get(artifact.family)
        if named is None:
            return None
        draft = next(
            (other for other in listing.artifacts if named in (other.artifact.name, other.artifact.family)), None
        )
        if draft is None and (artifact.name, named) not in told:
            told.add((artifact.name, named))
            _log.warning("model.no_draft", model=artifact.name, draft=named, fix=f"chorus models pull {named}")
        return draft

    def source(stored: StoredArtifact, listing: Listing) -> ModelSource:
        draft = draft_of(stored, listing)
        return ModelSource(
            stored.artifact,
            stored.path,
            required_bytes=needed_bytes(stored) + (needed_bytes(draft) if draft is not None else 0),
            adapters=tuple(adapter(found, stored) for found in listing.adapters_of(stored)),
            draft=None if draft is None else ModelSource(draft.artifact, draft.path),
        )

    def sources() -> list[ModelSource]:
        listing = store.scan()
        for broken in listing.broken:
            problem = (str(broken.place), broken.problem)
            if problem not in told:
                told.add(problem)
                _log.warning("model.broken", path=problem[0], why=problem[1])
        return [source(stored, listing) for stored in listing.artifacts]

    engine = LlamaEngine(
        sources(),
        LlamaSettings(
            slots=settings.slots,
            context_length=context_length,
            max_queue=settings.max_queue,
            threads=settings.threads or None,
            gpu_layers=settings.gpu_layers,
            patience=Patience(floor_s=settings.step_timeout_s),
        ),
    )

    async def refresh() -> None:
        await engine.offer(await asyncio.to_thread(sources))

    usable = binding.supports_gpu_offload()
    wanted = (DEFAULT_MODEL,) if settings.models is None else settings.models
    return HostedEngine(
        engine,
        models=tuple(_stored_name(store, name) for name in wanted),
        gpu_support=GpuSupport(usable=usable, fix="" if usable else _GPU_FIX),
        refresh=refresh,
        broken=engine.wait_broken,
    )


def _stored_name(store: ModelStore, name: str) -> str:
    """The artifact that `name` means in the folder (`family:quantization` too), or `name` where there is none yet."""
    try:
        return store.find(name).artifact.name
    except UnknownModelError:
        return name
