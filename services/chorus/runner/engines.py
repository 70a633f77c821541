"""What engine a runner hosts, by its configuration."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from chorus.config import RunnerSettings
from chorus.config.remote import RemoteServer
from chorus.core.errors import ChorusError, ModelFileError, UnknownModelError
from chorus.core.fitting.memory import CacheType
from chorus.core.residency.devices import Use
from chorus.core.resilience.stuck import Patience
from chorus.engine.base import Engine
from chorus.hardware import GpuSupport
from chorus.hardware.cgroup import memory_limit
from chorus.hardware.nvml import NvmlGpus
from chorus.models import (
    DEFAULT_MODEL,
    Listing,
    ModelStore,
    StoredAdapter,
    StoredArtifact,
    check_fit,
    check_vocabulary,
    read_adapter,
    shape_of,
)
from chorus.telemetry.logs import get_logger

if TYPE_CHECKING:
    from chorus.runner.tuned import TunedModels

_DEFAULT_CONTEXT = 4096
_GIB = 1 << 30
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
    # its HTTP client takes memory that a runner with an engine of its own needs not
    from chorus.engine.remote import RemoteEngine, RemoteSettings, read_api_key

    key_file = settings.remote_api_key_file
    engine = RemoteEngine(
        RemoteSettings(
            server=server,
            api_key="" if key_file is None else read_api_key(key_file),
            slots=settings.slots,
            max_queue=settings.max_queue,
            context_length=settings.context_length,
            prompt_timeout_s=settings.remote_prompt_timeout_s,
            token_timeout_s=settings.remote_token_timeout_s,
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
    from chorus.engine.llama import AdapterSource, LlamaEngine, LlamaSettings, ModelSource, ResidencySettings, binding
    from chorus.engine.llama.devices import DeviceReader
    from chorus.runner.tuned import TunedModels, this_machine

    context_length = settings.context_length or _DEFAULT_CONTEXT
    store = ModelStore.open(settings.models_dir)
    told: set[tuple[str, str]] = set()
    tunings = TunedModels(this_machine(gpu_layers=settings.gpu_layers))

    def adapter(found: StoredAdapter, stored: StoredArtifact) -> AdapterSource:
        info = found.info
        return AdapterSource(
            info.name,
            info.path,
            info.size_bytes,
            found.stamp,
            check=lambda: check_fit(read_adapter(info.path), stored.info),
        )

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
        tuned = tunings.tuned(stored.artifact, configured_threads=settings.threads)
        if settings.cache_type is not None:  # what somebody configured was meant
            tuned = dataclasses.replace(tuned, cache_type=None)
        return ModelSource(
            stored.artifact,
            stored.path,
            shape=shape_of(stored.info),
            adapters=tuple(adapter(found, stored) for found in listing.adapters_of(stored)),
            draft=None if draft is None else ModelSource(draft.artifact, draft.path, shape=shape_of(draft.info)),
            tuned=tuned,
        )

    @functools.cache  # once for each file
    def problem_of(path: Path, _sha256: str) -> str:
        try:
            check_vocabulary(path)
        except ModelFileError as error:
            return error.message
        return ""

    def sources() -> list[ModelSource]:
        listing = store.scan()
        problems = {(str(broken.place), broken.problem) for broken in listing.broken}
        found = {stored.path: problem_of(stored.path, stored.artifact.sha256) for stored in listing.artifacts}
        problems |= {(str(path), problem) for path, problem in found.items() if problem}
        for path, problem in sorted(problems - told):
            _log.warning("model.broken", path=path, why=problem)
        told.update(problems)
        return [source(stored, listing) for stored in listing.artifacts if not found[stored.path]]

    residency = ResidencySettings(
        reserve_bytes=int(settings.memory_reserve_gib * _GIB),
        limit_bytes=None if settings.memory_limit_gib is None else int(settings.memory_limit_gib * _GIB),
        max_loaded=settings.max_loaded_models,
        max_decoding=settings.max_decoding_models,
        keep_alive_s=settings.keep_alive_s,
        pinned=frozenset(_stored_name(store, name, tunings) for name in settings.pinned),
        gpu_uses={
            gpu: use if use in (Use.DYNAMIC, Use.RESERVED) else _stored_name(store, use, tunings)
            for gpu, use in settings.gpu_policy.items()
        },
        assignments={
            _stored_name(store, model, tunings): tuple(gpu.strip() for gpu in gpus.split("+"))
            for model, gpus in settings.gpu_assignments.items()
        },
    )
    engine = LlamaEngine(
        sources(),
        LlamaSettings(
            slots=settings.slots,
            context_length=context_length,
            max_queue=settings.max_queue,
            speculation=settings.speculation,
            threads=settings.threads or None,
            gpu_layers=settings.gpu_layers,
            patience=Patience(floor_s=settings.step_timeout_s),
            kv_tokens=settings.kv_tokens or None,
            cache_type=CacheType(settings.cache_type or "f16"),
            residency=residency,
        ),
        machine=DeviceReader(
            residency, host_limit=_host_limit, gpus=NvmlGpus().free_by_bus, uses_gpus=settings.gpu_layers != 0
        ),
    )

    async def refresh() -> None:
        await engine.offer(await asyncio.to_thread(sources))

    usable = binding.supports_gpu_offload()
    wanted = (DEFAULT_MODEL,) if settings.models is None else settings.models
    return HostedEngine(
        engine,
        models=tuple(_stored_name(store, name, tunings) for name in wanted),
        gpu_support=GpuSupport(usable=usable, fix="" if usable else _GPU_FIX),
        refresh=refresh,
        broken=engine.wait_broken,
    )


def _stored_name(store: ModelStore, name: str, tunings: TunedModels) -> str:
    """The artifact that `name` means in the folder (`family:quantization` too), or `name` where there is none yet.

    A family means the artifact that `chorus tune` made of it for this machine, where there is one.
    """
    try:
        stored = store.find(name)
    except UnknownModelError:
        return name
    if name.strip().lower() == stored.artifact.family.lower():
        stored = tunings.preferred(store, stored)
    return stored.artifact.name


def _host_limit() -> tuple[int, int] | None:
    """What this process's control group may use of the machine's memory, and what of that is free."""
    limit = memory_limit()
    return None if limit is None else (limit.limit_bytes, limit.free_bytes)
