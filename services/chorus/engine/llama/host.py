"""One model of the engine as the event loop sees it: on disk, being loaded, loaded, or failed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

import psutil

from chorus.core.errors import ChorusError, DrainingError, EngineError, ModelFileError, OutOfMemoryError
from chorus.core.fleet.records import ModelLoad, ModelState, ModelStatus
from chorus.core.generation import Phase, Progress
from chorus.core.residency.allocation import Allocation
from chorus.engine.base import ProgressCallback
from chorus.engine.llama import binding, ggml
from chorus.engine.llama.adapters import AdapterShelf, find_adapter
from chorus.engine.llama.devices import give_back_freed_memory
from chorus.engine.llama.drafting import check_vocabularies
from chorus.engine.llama.embedder import longest_input
from chorus.engine.llama.loaded import Loaded
from chorus.engine.llama.prompt import ModelFacts, PromptReader
from chorus.engine.llama.pulse import Pulse
from chorus.engine.llama.settings import AdapterSource, LlamaSettings, ModelSource
from chorus.engine.llama.survival import Waiting
from chorus.engine.llama.turns import Turns
from chorus.engine.llama.worker import Worker
from chorus.telemetry.logs import get_logger

_log = get_logger()
_BETWEEN_PROGRESS_S = 0.1
_ALL_LAYERS = 10_000
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
        turns: Turns,
        changed: Callable[[], None],
        failed: Callable[[Host], None],
        again: Callable[[Host, int], Awaitable[None]],
    ) -> None:
        """`loader` runs one load at a time; the owner thread takes `turns` with those of other models.

        `changed` is called whenever `status` has changed, `failed` when the owner thread has died; `again` loads
        it once more, with that context.
        """
        self.source = source
        self.artifact = source.artifact
        self.name = source.artifact.name
        self._engine_settings = settings
        self._settings = settings.tuned(source.tuned)
        self._engine = engine
        self._loader = loader
        self._turns = turns
        self._changed = changed
        self._failed = failed
        self._again = again
        self.state = ModelState.AVAILABLE
        self.error = ""
        self.facts = _UNKNOWN
        self.context_length = 0
        self._loaded: Loaded | None = None
        self._dead: Worker | None = None  # failed by itself, and perhaps still freeing what it had
        self._loading: asyncio.Task[None] | None = None
        self._unloading: asyncio.Task[None] | None = None
        self._break_off = False
        self._listeners: list[ProgressCallback] = []
        self._users = 0
        self._unused: asyncio.Event = asyncio.Event()
        self._unused.set()
        self._unloaders = 0  # those whose `unload` has not ended
        self._abandoned = False
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
        return self._loaded.worker.load if self._loaded is not None and self.state is ModelState.LOADED else None

    @property
    def loaded(self) -> Loaded:
        """What a request works with that was let in. Raises `DrainingError` if it is not loaded any more."""
        if self._loaded is None or self._unloading is not None:
            raise DrainingError(f"{self.name} is being unloaded")
        return self._loaded

    @property
    def closing(self) -> bool:
        """Whether nobody is let in: its owner has it unloaded, or its thread hangs. Who is in goes on."""
        return self._unloaders > 0 or self._abandoned

    def adapter_source(self, name: str) -> AdapterSource:
        """The adapter that a request names. Raises `NotFoundError`."""
        return find_adapter(self.source.adapters, name, model=self.name)

    def renew(self, source: ModelSource) -> bool:
        """Takes over another source of the same artifact: its adapters at once, the rest for the next load.

        Returns whether the adapters have changed.
        """
        changed = self.source.adapters != source.adapters
        self.source, self._settings = source, self._engine_settings.tuned(source.tuned)
        return changed

    @property
    def pulse(self) -> Pulse | None:
        """Of its owner thread, if that lives."""
        return self._loaded.worker.pulse if self._loaded is not None else None

    @property
    def is_failed(self) -> bool:
        """Whether it is down because of a failure."""
        return self.state is ModelState.FAILED

    @property
    def is_idle(self) -> bool:
        """Whether nobody uses it and nothing of it is in memory, so that it can be forgotten."""
        return not self._users and self._loading is None and self._loaded is None

    @property
    def in_memory(self) -> bool:
        """Whether it is loaded, and not on its way out."""
        return self._loaded is not None and self._unloading is None

    @property
    def is_settled(self) -> bool:
        """Whether nothing of it is in memory, nor on its way in."""
        return self._loaded is None and self._loading is None and self._unloading is None

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
        self.context_length = self.context_for(None)
        if self.facts.template_problem:
            _log.warning("chat template unusable", model=self.name, problem=self.facts.template_problem)

    def listen(self, listener: ProgressCallback) -> None:
        """Tells of the progress of a load, until `deafen`."""
        self._listeners.append(listener)

    def deafen(self, listener: ProgressCallback) -> None:
        """Ends `listen`."""
        self._listeners.remove(listener)

    def context_for(self, wanted: int | None) -> int:
        """How many tokens one request could use if it were loaded with `wanted`, or as the settings say."""
        most = self.facts.trained_context or wanted or self._settings.context_length
        return max(1, min(wanted or self._settings.context_length, most))

    def fail(self, error: ChorusError) -> None:
        """It can't be loaded."""
        self._become(ModelState.FAILED, error.message)

    async def load(self, allocation: Allocation, context_length: int) -> None:
        """Loads it, which nobody does at the same time, to where `allocation` says, with the context it is made for.

        Raises `ModelFileError`, `OutOfMemoryError`, or `DrainingError` if it is broken off by `unload`.
        """
        self._break_off = False
        self._loading = asyncio.create_task(self._load(allocation, context_length))
        await asyncio.shield(self._loading)

    async def _load(self, allocation: Allocation, context_length: int) -> None:
        loop = asyncio.get_running_loop()
        source, settings = self.source, self._settings  # as they were planned for; both may be renewed meanwhile
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
            opened = loop.run_in_executor(self._loader, self._open, source, settings, allocation, report)
            model, reader, end_tokens, draft = await opened
            self.facts = reader.facts
            self.context_length = self.context_for(context_length)
            embedding_length = longest_input(model, self.context_length)
            worker = Worker(
                model,
                name=self.name,
                context_length=self.context_length,
                embedding_length=embedding_length,
                settings=settings,
                turns=self._turns,
                failed=self._on_failed,
                draft=draft,
            )
            try:
                await worker.ready
            except ChorusError as error:
                await worker.stop()
                raise self._explained(error, allocation) from error
        except ChorusError as error:
            broken_off = self._break_off
            self.context_length = self.context_for(None)  # as it will be loaded for who chooses none
            # that there is no memory for a context somebody has chosen says nothing of the usual one
            too_large = isinstance(error, OutOfMemoryError) and context_length != self.context_for(None)
            if broken_off or too_large:
                self._become(ModelState.AVAILABLE)
            else:
                self._become(ModelState.FAILED, error.message)
            if broken_off:
                raise DrainingError("the load was broken off: the engine is shutting down") from error
            raise
        except BaseException:
            self._become(ModelState.FAILED, "the load was broken off by an internal error")
            raise
        finally:
            self._loading = None
        shelf = AdapterShelf(model, settings, loader=self._loader, send=worker.send)
        self._loaded = Loaded(model, reader, worker, shelf, end_tokens, self.context_length, embedding_length)
        _log.info("model loaded", model=self.name, seconds=round(time.monotonic() - began, 2))
        self._become(ModelState.LOADED)
        if self._break_off:
            await self.unload(wait=False)
            raise DrainingError("the engine is shutting down")

    def _open(
        self,
        source: ModelSource,
        settings: LlamaSettings,
        allocation: Allocation,
        report: Callable[[float], bool],
    ) -> tuple[binding.Model, PromptReader, frozenset[int], binding.Model | None]:
        """In the loader's thread: reads the weights."""
        if self._break_off:
            raise DrainingError("the engine is shutting down")
        if not source.path.is_file():
            raise ModelFileError(f"{source.path} is not there any more")
        offload = ggml.Offload([(share.device, share.layers) for share in allocation.shares])
        try:
            model = binding.Model(source.path, offload=offload, lock_memory=settings.lock_memory, progress=report)
        except EngineError as error:
            explained = self._explained(error, allocation)
            raise (ModelFileError(error.message) if explained is error else explained) from error
        try:
            reader, end_tokens = PromptReader(model, source.chat_template), model.end_tokens()
            draft = self._open_draft(model, source, settings, allocation)
            give_back_freed_memory()  # reading a file takes twenty megabytes for a while
            return model, reader, end_tokens, draft
        except BaseException:
            model.close()
            raise

    def _open_draft(
        self, target: binding.Model, source: ModelSource, settings: LlamaSettings, allocation: Allocation
    ) -> binding.Model | None:
        """The model that is to draft for this one, if there is one and guesses are of use."""
        guesser = source.draft
        if guesser is None or not settings.speculation or not target.generates or not target.copies_prefixes:
            return None
        # It goes where the target's last layers are; with more layers than there are, whole.
        beside = [(share.device, _ALL_LAYERS) for share in allocation.shares[-1:]]
        try:
            draft = binding.Model(guesser.path, offload=ggml.Offload(beside), lock_memory=settings.lock_memory)
        except EngineError as error:
            raise ModelFileError(f"the draft model of {self.name}: {error.message}") from error
        try:
            check_vocabularies(target, draft, target_name=self.name, draft_name=guesser.artifact.name)
        except BaseException:
            draft.close()
            raise
        return draft

    def _explained(self, error: ChorusError, allocation: Allocation) -> ChorusError:
        """`OutOfMemoryError`, where llama.cpp could not allocate what the estimate said would fit."""
        if "alloc" not in error.message and "memory" not in error.message:
            return error
        parts = [f"{_mebibytes(allocation.host_bytes)} of memory"]
        parts += [f"{_mebibytes(share.bytes)} on {share.device}" for share in allocation.shares]
        return OutOfMemoryError(
            f"{self.name} was to take about {' and '.join(parts)}, but there was not as much ({error.message}); choose "
            "a smaller quantization, a shorter context or fewer slots, or raise runner.memory_reserve_gib",
            metadata={
                "required_bytes": str(allocation.host_bytes + sum(share.bytes for share in allocation.shares)),
                "available_bytes": str(psutil.virtual_memory().available),
            },
        )

    # --- unloading --------------------------------------------------------------------------------------------------

    async def unload(self, *, wait: bool, closes: Callable[[], None] = lambda: None) -> None:
        """Unloads it; with `wait`, once nobody uses it any more. A load under way is broken off.

        Nobody is let in meanwhile. `closes` is called when nothing can keep it in memory any more.
        """
        self._unloaders += 1
        try:
            if self._loading is not None:
                self._break_off = True
                await asyncio.wait([self._loading])
            if wait and self._loaded is not None and self._unloading is None:
                await self._served(self._loaded.worker)
            if self._loaded is not None or self._unloading is not None:
                closes()
                await self.evict()
            elif not self._abandoned:
                await self._bury()
                self._become(ModelState.AVAILABLE)
        finally:
            self._unloaders -= 1

    async def _served(self, worker: Worker) -> None:
        """Returns once nobody uses it any more, or its thread has ended, by itself or since somebody did not wait."""
        unused = asyncio.create_task(self._unused.wait())
        either: set[asyncio.Future[Any]] = {unused, worker.ended}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            unused.cancel()

    async def evict(self) -> None:
        """Unloads it to make room; who comes meanwhile may have it loaded again."""
        if self._unloading is None and self._loaded is not None:
            self._unloading = asyncio.create_task(self._unload(self._loaded))
        unloading = self._unloading
        if unloading is not None:
            await asyncio.wait([unloading])
            if not unloading.cancelled():  # else its thread hangs, and nobody waits for that
                unloading.result()

    def after_unloading(self, call: Callable[[], None]) -> None:
        """Calls `call` when the unloading that is under way has ended, however it ends; at once where none is."""
        if self._unloading is None:
            call()
        else:
            self._unloading.add_done_callback(lambda _: call())

    async def _unload(self, loaded: Loaded) -> None:
        try:
            await loaded.worker.stop()
            self._loaded = None
            await self._give_back()
        finally:
            if self._loaded is loaded:
                self._loaded = None
            self._unloading = None
        self.context_length = self.context_for(None)
        self._become(ModelState.AVAILABLE)
        _log.info("model unloaded", model=self.name)

    async def _give_back(self) -> None:
        """Freed memory goes back to the system before anything else is loaded."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._loader, give_back_freed_memory)
        except RuntimeError:  # the engine has stopped, and its threads with it
            give_back_freed_memory()

    def _on_failed(self, error: ChorusError) -> None:
        """The owner thread died. Called before its streams hear of it, so that none comes back to a dead one."""
        if self._unloading is not None:
            return
        dead, self._loaded = self._loaded, None
        self._dead = None if dead is None else dead.worker
        self._become(ModelState.FAILED, error.message)
        self._failed(self)
        if self.on_death is not None and dead is not None:
            self.on_death(self, time.monotonic() - dead.worker.pulse.born)

    def abandon(self, error: ChorusError) -> None:
        """The owner thread hangs: whatever waits for it ends with `error`, and nothing is loaded here again.

        What the thread holds is not freed: this process is to end. Its turn alone is given on, so that the streams of
        other models come to their ends before.
        """
        if self._unloading is not None:
            self._unloading.cancel()
        if self._loaded is not None:
            self._turns.give_on(self._loaded.worker)
            self._loaded.worker.give_up(error)
        self._loaded, self._abandoned = None, True
        self._become(ModelState.FAILED, error.message)
        self.waiting.end_all(error)

    async def revive(self) -> None:
        """Loads it again, as it was, after its owner thread died."""
        await self._again(self, self.context_length)

    async def _bury(self) -> None:
        dead = self._dead
        if dead is not None:
            await dead.stop()
        if self._dead is dead:  # it stays there for the next one where this was cancelled
            self._dead = None

    # --- inside -----------------------------------------------------------------------------------------------------

    def _tell(self, progress: Progress) -> None:
        for listener in list(self._listeners):
            listener(progress)

    def _become(self, state: ModelState, error: str = "") -> None:
        self.state, self.error = state, error
        self._changed()


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
