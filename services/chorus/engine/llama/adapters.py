"""The LoRA adapters of one loaded model that are in memory: read when first named, freed when others need the room."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import psutil

from chorus.core.errors import (
    EngineError,
    ModelFileError,
    NotFoundError,
    OutOfMemoryError,
    OverloadedError,
)
from chorus.engine.llama.binding import Adapter, Model
from chorus.engine.llama.commands import Command, ReleaseAdapter
from chorus.engine.llama.settings import AdapterSource, LlamaSettings
from chorus.telemetry.logs import get_logger

_log = get_logger()
_READ_BYTES = 1 << 20
_RETRY_S = 2.0


def find_adapter(sources: tuple[AdapterSource, ...], name: str, *, model: str) -> AdapterSource:
    """The adapter of that name. Raises `NotFoundError`, which names those there are."""
    for source in sources:
        if source.name == name:
            return source
    known = ", ".join(sorted(source.name for source in sources))
    there_are = f"it has: {known}" if known else "it has none; put the adapter's GGUF file into the models folder"
    raise NotFoundError(
        f"{model} has no adapter {name[:100]!r} here; {there_are}", metadata={"adapter": name[:100], "model": model}
    )


@dataclass(slots=True, eq=False)
class _Held:
    loading: asyncio.Task[Adapter]
    users: int = 0


class AdapterShelf:
    """Belongs to the event loop; files are read in the loader's thread, and freed by the model's owner thread."""

    def __init__(
        self, model: Model, settings: LlamaSettings, *, loader: Executor, send: Callable[[Command], None]
    ) -> None:
        """`send` hands a command to the owner thread."""
        self._model = model
        self._settings = settings
        self._loader = loader
        self._send = send
        self._held: OrderedDict[AdapterSource, _Held] = OrderedDict()  # the one used longest ago first

    async def take(self, source: AdapterSource) -> Adapter:
        """The adapter in memory, which stays there until `give_back`; who asks for it meanwhile shares its load.

        Raises `ModelFileError` where the file is not sound or does not fit, `OutOfMemoryError`, and `OverloadedError`
        where as many as may be kept are in use.
        """
        held = self._held.get(source)
        if held is None:
            self._make_room()
            held = self._held[source] = _Held(asyncio.create_task(self._load(source)))
            held.loading.add_done_callback(lambda task: self._forget_failed(source, task))
        self._held.move_to_end(source)
        held.users += 1
        try:
            return await asyncio.shield(held.loading)
        except BaseException:
            held.users -= 1
            raise

    def give_back(self, source: AdapterSource) -> None:
        """Who took it does not need it any more."""
        self._held[source].users -= 1

    def _make_room(self) -> None:
        if len(self._held) < self._settings.adapters_kept:
            return
        for source, held in self._held.items():
            if not held.users and held.loading.done():
                del self._held[source]
                self._send(ReleaseAdapter(held.loading.result()))
                return
        raise OverloadedError(
            f"{len(self._held)} adapters are in use at once, and no more fit; try again when one has ended",
            retry_after_s=_RETRY_S,
        )

    def _forget_failed(self, source: AdapterSource, task: asyncio.Task[Adapter]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._held.pop(source, None)

    async def _load(self, source: AdapterSource) -> Adapter:
        adapter = await asyncio.get_running_loop().run_in_executor(self._loader, self._read, source)
        _log.info("adapter loaded", adapter=source.name, bytes=source.size_bytes)
        return adapter

    def _read(self, source: AdapterSource) -> Adapter:
        """In the loader's thread."""
        available = psutil.virtual_memory().available - self._settings.residency.reserve_bytes
        if source.size_bytes > available:
            raise OutOfMemoryError(
                f"the adapter {source.name} needs {source.size_bytes / 2**20:,.0f} MiB of memory and "
                f"{max(available, 0) / 2**20:,.0f} MiB are free",
                metadata={"needed_bytes": str(source.size_bytes), "available_bytes": str(max(available, 0))},
            )
        try:
            # What is read here need not come from the disk while a stream may wait for llama.cpp's list of adapters.
            with source.path.open("rb") as file:
                while file.read(_READ_BYTES):
                    pass
        except OSError as error:
            raise ModelFileError(f"{source.path} can't be read: {error.strerror or error}") from error
        source.check()
        try:
            return self._model.load_adapter(source.path)
        except EngineError as error:
            raise ModelFileError(error.message) from error
