"""One model of the engine as the event loop sees it: on disk, being loaded, loaded, or failed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor

import psutil
import structlog

from chorus.core.errors import (
    ChorusError,
    DrainingError,
    EngineError,
    InvalidRequestError,
    ModelFileError,
    OutOfMemoryError,
)
from chorus.core.fleet.records import ModelLoad, ModelState, ModelStatus
from chorus.core.generation import Phase, Progress
from chorus.engine.base import ProgressCallback
from chorus.engine.llama import binding
from chorus.engine.llama.adapters import AdapterShelf, find_adapter
from chorus.engine.llama.drafting import check_vocabularies
from chorus.engine.llama.embedder import longest_input
from chorus.engine.llama.prompt import ModelFacts, PromptReader
from chorus.engine.llama.pulse import Pulse
from chorus.engine.llama.settings import AdapterSource, LlamaSettings, ModelSource
from chorus.engine.llama.survival import Waiting
from chorus.engine.llama.worker import Worker

_log = structlog.get_logger("chorus.engine.llama")
_BETWEEN_PROGRESS_S = 0.1
_UNKNOWN = ModelFacts(frozenset(), generates=False, trained_context=0)


class Host:
    """Loads, unloads and describes one model. Everything runs on the event loop but what is given to `loader`."""

    def __init__(
        self,
        source: ModelSource,
        settings: LlamaSettings,
        *,
        engine: str,
        loader: Executor,
        changed: Callable[[], None],
    ) -> None:
        """`loader` runs one load at a time; `changed` is called whenever `status` has changed."""
        self.source = source
        self.artifact = source.artifact
        self.name = source.artifact.name
        self._settings = settings
        self._engine = engine
        self._loader = loader
        self._changed = changed
        self.state = ModelState.AVAILABLE
        self.error = ""
        self.facts = _UNKNOWN
        self.context_length = 0
        self.end_tokens: frozenset[int] = frozenset()
        self.embedding_length = 0
        self._model: binding.Model | None = None
        self._reader: PromptReader | None = None
        self._worker: Worker | None = None
        self._shelf: AdapterShelf | None = None
        self._dead: Worker | None = None  # failed by itself, and perhaps still freeing what it had
        self._loading: asyncio.Task[None] | None = None
        self._break_off = False
        self._listeners: list[ProgressCallback] = []
        self._users = 0
        self._unused: asyncio.Event = asyncio.Event()
        self._unused.set()
        self.closing = False
        self.waiting = Waiting()
        self.on_death: Callable[[Host, float], None] | None = None  # given the seconds for which its thread lived

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def status(self) -> ModelStatus:
        """As it stands now."""
        return ModelStatus(
            artifact=self.artifact,
            engine=self._engine,
            state=self.state,
            features=self.facts.features,
            context_length=self.context_length,
            slot_count=self._settings.slots,
            error=self.error,
            adapters=tuple(source.name for source in self.source.adapters) if self.facts.generates else (),
        )

    @property
    def load_report(self) -> ModelLoad | None:
        """Its load, if it is loaded."""
        return self._worker.load if self._worker is not None and self.state is ModelState.LOADED else None

    @property
    def model(self) -> binding.Model:
        """The weights. Raises `DrainingError` if it is not loaded (any more)."""
        if self._model is None or self._worker is None or self.closing:
            raise DrainingError(f"{self.name} is being unloaded")
        return self._model

    @property
    def worker(self) -> Worker:
        """The owner thread. Raises `DrainingError` if it is not loaded (any more)."""
        if self._worker is None or self.closing:
            raise DrainingError(f"{self.name} is being unloaded")
        return self._worker

    @property
    def reader(self) -> PromptReader:
        """Template and tokenizer. Raises `DrainingError` if it is not loaded (any more)."""
        if self._reader is None or self.closing:
            raise DrainingError(f"{self.name} is being unloaded")
        return self._reader

    def adapter_source(self, name: str) -> AdapterSource:
        """The adapter that a request names. Raises `NotFoundError`."""
        return find_adapter(self.source.adapters, name, model=self.name)

    @property
    def shelf(self) -> AdapterShelf:
        """The adapters in memory. Raises `DrainingError` if the model is not loaded (any more)."""
        if self._shelf is None or self.closing:
            raise DrainingError(f"{self.name} is being unloaded")
        return self._shelf

    def renew(self, source: ModelSource) -> bool:
        """Takes over another source of the same artifact: its adapters at once, the rest for the next load.

        Returns whether the adapters have changed.
        """
        changed = self.source.adapters != source.adapters
        self.source = source
        return changed

    @property
    def pulse(self) -> Pulse | None:
        """Of its owner thread, if that lives."""
        return self._worker.pulse if self._worker is not None else None

    @property
    def is_failed(self) -> bool:
        """Whether it is down because of a failure."""
        return self.state is ModelState.FAILED

    @property
    def is_idle(self) -> bool:
        """Whether nobody uses it and nothing of it is in memory, so that it can be forgotten."""
        return not self._users and self._loading is None and self._worker is None

    # --- users ------------------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """A request begins to use it."""
        self._users += 1
        self._unused.clear()

    def leave(self) -> None:
        """A request is done with it."""
        self._users -= 1
        if not self._users:
            self._unused.set()

    # --- loading ----------------------------------------------------------------------------------------------------

    def probe(self) -> None:
        """Reads what the file says of itself, without its weights. Called in the loader's thread; never raises."""
        try:
            model = binding.Model(self.source.path, vocabulary_only=True)
            try:
                self.facts = PromptReader(model, self.source.chat_template).facts
            finally:
                model.close()
        except ChorusError as error:
            self.state, self.error = ModelState.FAILED, error.message
            return
        self.context_length = self._context(None)
        if self.facts.template_problem:
            _log.warning("chat template unusable", model=self.name, problem=self.facts.template_problem)

    async def load(self, progress: ProgressCallback | None, context_length: int | None) -> None:
        """Loads it, unless it is loaded; everybody who asks meanwhile shares the load."""
        if self.closing:
            raise DrainingError(f"{self.name} is being unloaded")
        if self.state is ModelState.LOADED:
            if context_length is not None and self._context(context_length) != self.context_length:
                raise InvalidRequestError(
                    "context_length", f"{self.name} is loaded with {self.context_length}; unload it first"
                )
            return
        if self._loading is None:
            self._break_off = False
            self._loading = asyncio.create_task(self._load(context_length))
            self._loading.add_done_callback(_note)
        if progress is not None:
            self._listeners.append(progress)
        try:
            await asyncio.shield(self._loading)
        finally:
            if progress is not None:
                self._listeners.remove(progress)

    async def loading(self) -> AsyncIterator[Progress]:
        """Loads it, yielding how far that is."""
        queue: asyncio.Queue[Progress | None] = asyncio.Queue()
        task = asyncio.create_task(self.load(queue.put_nowait, None))
        task.add_done_callback(_note)
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (progress := await queue.get()) is not None:
                yield progress
            await task
        finally:
            task.cancel()

    async def _load(self, context_length: int | None) -> None:
        loop = asyncio.get_running_loop()
        size = self.artifact.size_bytes
        told_at = 0.0

        def report(fraction: float) -> bool:
            nonlocal told_at
            now = time.monotonic()
            if now - told_at >= _BETWEEN_PROGRESS_S or fraction >= 1.0:
                told_at = now
                loop.call_soon_threadsafe(self._tell, Progress(Phase.LOADING, int(size * fraction), size))
            return not self._break_off

        self._become(ModelState.LOADING)
        began = time.monotonic()
        try:
            await self._bury()
            model, reader, end_tokens, draft = await loop.run_in_executor(self._loader, self._open, report)
            self.facts = reader.facts
            self.end_tokens = end_tokens
            self.context_length = self._context(context_length)
            self.embedding_length = longest_input(model, self.context_length)
            worker = Worker(
                model,
                name=self.name,
                context_length=self.context_length,
                embedding_length=self.embedding_length,
                settings=self._settings,
                failed=self._on_failed,
                draft=draft,
            )
            try:
                await worker.ready
            except ChorusError as error:
                await worker.stop()
                raise self._explained(error) from error
        except ChorusError as error:
            broken_off = self._break_off
            self._become(ModelState.AVAILABLE if broken_off else ModelState.FAILED, "" if broken_off else error.message)
            if broken_off:
                raise DrainingError("the load was broken off: the engine is shutting down") from error
            raise
        except BaseException:
            self._become(ModelState.FAILED, "the load was broken off by an internal error")
            raise
        finally:
            self._loading = None
        self._model, self._reader, self._worker = model, reader, worker
        self._shelf = AdapterShelf(model, self._settings, loader=self._loader, send=worker.send)
        _log.info("model loaded", model=self.name, seconds=round(time.monotonic() - began, 2))
        self._become(ModelState.LOADED)
        if self._break_off:
            await self.unload(wait=False)
            raise DrainingError("the engine is shutting down")

    def _open(
        self, report: Callable[[float], bool]
    ) -> tuple[binding.Model, PromptReader, frozenset[int], binding.Model | None]:
        """In the loader's thread: reads the weights."""
        settings = self._settings
        if self._break_off:
            raise DrainingError("the engine is shutting down")
        if not self.source.path.is_file():
            raise ModelFileError(f"{self.source.path} is not there any more")
        self._require_memory()
        try:
            model = binding.Model(
                self.source.path, gpu_layers=settings.gpu_layers, lock_memory=settings.lock_memory, progress=report
            )
        except EngineError as error:
            raise ModelFileError(error.message) from error
        try:
            reader, end_tokens = PromptReader(model, self.source.chat_template), model.end_tokens()
            return model, reader, end_tokens, self._open_draft(model)
        except BaseException:
            model.close()
            raise

    def _open_draft(self, target: binding.Model) -> binding.Model | None:
        """The model that is to draft for this one, if there is one and guesses are of use."""
        source, settings = self.source.draft, self._settings
        if source is None or not settings.speculation or not target.generates or not target.copies_prefixes:
            return None
        try:
            draft = binding.Model(source.path, gpu_layers=settings.gpu_layers, lock_memory=settings.lock_memory)
        except EngineError as error:
            raise ModelFileError(f"the draft model of {self.name}: {error.message}") from error
        try:
            check_vocabularies(target, draft, target_name=self.name, draft_name=source.artifact.name)
        except BaseException:
            draft.close()
            raise
        return draft

    def _require_memory(self) -> None:
        offloads = self._settings.gpu_layers != 0 and binding.supports_gpu_offload()
        needed = self.source.required_bytes
        if needed is None or offloads:  # what goes to a graphics device is not taken from here
            return
        free = psutil.virtual_memory().available - self._settings.memory_reserve_bytes
        if needed > free:
            raise OutOfMemoryError(
                f"{self.name} needs about {_mebibytes(needed)} of memory, and {_mebibytes(max(free, 0))} are free; "
                "choose a smaller quantization, a shorter context or fewer slots",
                metadata={"required_bytes": str(needed), "available_bytes": str(max(free, 0))},
            )

    def _explained(self, error: ChorusError) -> ChorusError:
        if "alloc" not in error.message and "memory" not in error.message:
            return error
        free = psutil.virtual_memory().available
        needed = self.source.required_bytes
        return OutOfMemoryError(
            f"{self.name} does not fit: it needs "
            f"{_mebibytes(needed) if needed else 'more memory'} and {_mebibytes(free)} are free ({error.message})",
            metadata={"required_bytes": str(needed or 0), "available_bytes": str(free)},
        )

    # --- unloading --------------------------------------------------------------------------------------------------

    async def unload(self, *, wait: bool) -> None:
        """Unloads it; with `wait`, once nobody uses it any more. A load under way is broken off."""
        if self._loading is not None:
            self._break_off = True
            await asyncio.wait([self._loading])
        if self._worker is None:
            await self._bury()
            self._become(ModelState.AVAILABLE)
            return
        if self.closing:
            await asyncio.shield(self._worker.ended)
            return
        self.closing = True
        try:
            if wait:
                await self._unused.wait()
        except asyncio.CancelledError:
            self.closing = False
            raise
        try:
            await self._worker.stop()
        finally:
            self._forget()
        self._become(ModelState.AVAILABLE)
        _log.info("model unloaded", model=self.name)

    def _on_failed(self, error: ChorusError) -> None:
        """The owner thread died. Called before its streams hear of it, so that none comes back to a dead one."""
        if self.closing:
            return
        self._dead = dead = self._worker
        self._forget()
        self._become(ModelState.FAILED, error.message)
        if self.on_death is not None and dead is not None:
            self.on_death(self, time.monotonic() - dead.pulse.born)

    def abandon(self, error: ChorusError) -> None:
        """The owner thread hangs: whatever waits for it ends with `error`, and nothing is loaded here again.

        What the thread holds is not freed: this process is to end.
        """
        self._forget()
        self.closing = True
        self._become(ModelState.FAILED, error.message)
        self.waiting.end_all(error)

    async def revive(self) -> None:
        """Loads it again, as it was, after its owner thread died."""
        await self.load(None, self.context_length)

    async def _bury(self) -> None:
        dead, self._dead = self._dead, None
        if dead is not None:
            await dead.stop()

    def _forget(self) -> None:
        self._model = self._reader = self._worker = self._shelf = None
        self.closing = False

    # --- inside -----------------------------------------------------------------------------------------------------

    def _context(self, wanted: int | None) -> int:
        most = self.facts.trained_context or wanted or self._settings.context_length
        return max(1, min(wanted or self._settings.context_length, most))

    def _tell(self, progress: Progress) -> None:
        for listener in list(self._listeners):
            listener(progress)

    def _become(self, state: ModelState, error: str = "") -> None:
        self.state, self.error = state, error
        self._changed()


def _note(task: asyncio.Task[None]) -> None:
    """Looks at a load's error, since everybody who waited for it may have gone; the model's state keeps it."""
    if not task.cancelled():
        task.exception()


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
