"""An engine without a model: exact, cheap, and able to fail on demand.

Its answers are position tokens (see `fake_vocabulary`); a prompt whose last line holds `echo:` is answered with the
text after it, one token a byte, so that tests can have any text, cut anywhere.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from chorus.core.batching.waiting import WaitingRoom
from chorus.core.errors import (
    ChorusError,
    DrainingError,
    EngineError,
    InvalidRequestError,
    PromptTooLongError,
    UnsupportedFeatureError,
)
from chorus.core.fleet.records import (
    Artifact,
    EngineInfo,
    EngineKind,
    Feature,
    ModelLoad,
    ModelState,
    ModelStatus,
)
from chorus.core.generation import (
    Embedding,
    EmbeddingRequest,
    Event,
    GenerationRequest,
    Phase,
    Progress,
    Prompt,
    Queued,
    Ranked,
    Ranking,
    RerankRequest,
    Tool,
)
from chorus.engine.base import ProgressCallback
from chorus.engine.selection import require_features, select_model
from chorus.testing import fake_vocabulary as vocabulary
from chorus.testing.fake_answer import FakeAnswer
from chorus.testing.fake_model import FAKE_FEATURES, FakeModel, fake_artifact
from chorus.testing.pace import Pace, RatePace

__all__ = ["FAKE_FEATURES", "FakeEngine", "FakeModel", "Fault", "fake_artifact"]


@dataclass
class Fault:
    """What goes wrong with one generation: before anything (`before` None), or instead of the token with that index."""

    kind: Literal["fail", "hang"]
    before: int | None
    error: ChorusError


class _Run:
    """One generation between its arrival and its end. `abort` may be called at any time on the event loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.error: ChorusError | None = None
        self.has_slot = False
        self.admission: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self._blocked_on: asyncio.Future[None] | None = None

    def abort(self, error: ChorusError) -> None:
        self.error = error
        for future in (self.admission, self._blocked_on):
            if future is not None and not future.done():
                future.set_result(None)

    async def wait(self, future: asyncio.Future[None]) -> None:
        """Raises the error if aborted before or while it waits."""
        self._blocked_on = future
        try:
            if self.error is None:
                await future
        finally:
            self._blocked_on = None
        if self.error is not None:
            raise self.error


class _Host:
    """One model with its slots."""

    def __init__(self, model: FakeModel, slots: int, max_queue: int) -> None:
        self.model = model
        self.state = ModelState.LOADED if model.loaded else ModelState.AVAILABLE
        self.error = ""
        self.context_length = model.context_length
        self.loading: asyncio.Task[None] | None = None
        self.progress: list[ProgressCallback] = []
        self.slots = slots
        self.slots_used = 0
        self.room: WaitingRoom[_Run] = WaitingRoom(max_queue)
        self.runs: set[_Run] = set()


class FakeEngine:
    """Implements `chorus.engine.base.Engine`. All of it runs on the event loop that calls it.

    `pace` says when tokens come (each choice's next token waits for one permit), `load_delay_s` how long a load takes.
    """

    def __init__(
        self,
        models: Sequence[FakeModel] = (FakeModel(),),
        *,
        name: str = "fake",
        slots: int = 8,
        max_queue: int = 64,
        pace: Pace | None = None,
        tokens_per_second: float = 0.0,
        load_delay_s: float = 0.0,
    ) -> None:
        self._info = EngineInfo(name=name, version="1", kind=EngineKind.LOCAL, backends=("fake",))
        self._hosts = {model.artifact.name: _Host(model, slots, max_queue) for model in models}
        self._slots = slots
        self._load_delay_s = load_delay_s
        self._callbacks: list[Callable[[], None]] = []
        self._stopped = False
        self.pace: Pace = pace or RatePace(tokens_per_second)
        self.faults: list[Fault] = []

    # --- failure on demand ------------------------------------------------------------------------------------------

    def fail_next(self, *, before: int | None = None, error: ChorusError | None = None, times: int = 1) -> None:
        """The next `times` generations fail: before anything, or instead of the token with index `before`."""
        fault = Fault("fail", before, error or EngineError("the fake engine was told to fail"))
        self.faults.extend([fault] * times)

    def hang_next(self, *, before: int | None = None, times: int = 1) -> None:
        """The next `times` generations say nothing more from there on, until they are cancelled."""
        self.faults.extend([Fault("hang", before, EngineError("hung"))] * times)

    # --- models -----------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""
        return self._info

    async def start(self) -> None:
        """Nothing to find."""
        self._stopped = False

    async def stop(self) -> None:
        """Ends every generation with `DrainingError`; no more are taken."""
        self._stopped = True
        for host in self._hosts.values():
            if host.loading is not None:
                host.loading.cancel()
            self._abort_all(host)

    def models(self) -> tuple[ModelStatus, ...]:
        """Every model as it stands."""
        return tuple(
            ModelStatus(
                artifact=host.model.artifact,
                engine=self._info.name,
                state=host.state,
                features=host.model.features,
                context_length=host.context_length,
                slot_count=self._slots,
                error=host.error,
            )
            for host in self._hosts.values()
        )

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls `callback` whenever a model's state changes."""
        self._callbacks.append(callback)

    def load_report(self) -> tuple[ModelLoad, ...]:
        """The load of each loaded model."""
        return tuple(
            ModelLoad(model=name, slots_used=host.slots_used, slots_total=host.slots, queued=len(host.room))
            for name, host in self._hosts.items()
            if host.state is ModelState.LOADED
        )

    async def load(
        self, model: str, progress: ProgressCallback | None = None, *, context_length: int | None = None
    ) -> ModelStatus:
        """Loads a model, in four steps over `load_delay_s`."""
        host = self._hosts[select_model(self.models(), model).artifact.name]
        if host.state is not ModelState.LOADED:
            if host.loading is None:
                host.loading = asyncio.create_task(self._load(host, context_length))
            if progress is not None:
                host.progress.append(progress)
            try:
                await asyncio.shield(host.loading)
            except asyncio.CancelledError:
                if self._stopped:
                    raise DrainingError("the engine is shutting down") from None
                raise
        return self._status(host)

    async def unload(self, model: str, *, wait: bool = False) -> ModelStatus:
        """Unloads a model."""
        host = self._hosts[select_model(self.models(), model).artifact.name]
        if wait:
            await asyncio.gather(*(run.done for run in host.runs))
        else:
            self._abort_all(host)
        self._change(host, ModelState.AVAILABLE)
        return self._status(host)

    # --- work -------------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generates, as `Engine.generate` says."""
        host = self._host(request.model, request.needed_features(), request.requirements.artifact_sha256)
        fault = self.faults.pop(0) if self.faults else None
        run = _Run()
        host.runs.add(run)
        arrived = asyncio.get_running_loop().time()
        try:
            if host.state is not ModelState.LOADED:
                async for progress in self._loading(host):
                    yield progress
            prompt = vocabulary.prompt_tokens(request.prompt)
            self._check(host, request, prompt)
            if host.slots_used < host.slots and not host.room:
                self._take_slot(host, run)
            else:
                position = host.room.add(run, request.priority)
                yield Queued(position, host.room.rate.wait_s(position + 1))
                await run.wait(run.admission)
            if fault is not None and fault.before is None:
                await self._go_wrong(run, fault)
            answer = FakeAnswer(
                host.model.artifact,
                request,
                prompt,
                host.context_length,
                host.model.answer_tokens,
                with_ids=Feature.TOKEN_IDS in host.model.features,
            )
            for event in answer.start():
                yield event
            pace = self.pace.begin()
            while (step := answer.next_step()) is not None:
                if fault is not None and fault.before is not None and step >= fault.before:
                    await self._go_wrong(run, fault)
                for choice in answer.unfinished:
                    due = pace.due()
                    if due is not None:
                        await run.wait(due)
                    if run.error is not None:
                        raise run.error
                    yield answer.token(choice)
            yield answer.finish(arrived)
        finally:
            self._leave(host, run)

    async def embed(self, request: EmbeddingRequest) -> tuple[Artifact, Sequence[Embedding]]:
        """Vectors of 16 components that follow from the text alone."""
        host = self._host(request.model, {Feature.EMBED}, request.requirements.artifact_sha256)
        await self.load(host.model.artifact.name)
        embeddings = []
        for item in request.inputs:
            token_ids = vocabulary.tokenize(item, add_special=True) if isinstance(item, str) else list(item)
            self._check_ids(token_ids)
            truncated = len(token_ids) > host.context_length
            if truncated:
                if request.truncate is None:
                    raise PromptTooLongError(len(token_ids), host.context_length, model=host.model.artifact.name)
                cut = host.context_length
                token_ids = token_ids[-cut:] if request.truncate == "start" else token_ids[:cut]
            digest = hashlib.sha256(vocabulary.detokenize(token_ids, show_special=False).encode()).digest()[:16]
            values = [byte - 127.5 for byte in digest]
            norm = sum(value * value for value in values) ** 0.5 if request.normalize else 1.0
            embeddings.append(Embedding(tuple(value / norm for value in values), len(token_ids), truncated))
        return host.model.artifact, embeddings

    async def rerank(self, request: RerankRequest) -> tuple[Artifact, Ranking]:
        """A score is the share of the query's words that are in the document."""
        host = self._host(request.model, {Feature.RERANK}, request.requirements.artifact_sha256)
        await self.load(host.model.artifact.name)
        asked, longest, count, ranked = set(request.query.split()), host.context_length, 0, []
        for index, document in enumerate(request.documents):
            size = len(request.query.encode()) + len(document.encode()) + 2
            truncated = size > longest
            if truncated and request.truncate is None:
                raise PromptTooLongError(size, longest, model=host.model.artifact.name)
            count += min(size, longest)
            ranked.append(Ranked(index, len(asked & set(document.split())) / max(1, len(asked)), truncated))
        return host.model.artifact, Ranking.of(ranked, count, request.top_n)

    async def tokenize(
        self,
        model: str,
        text: str,
        *,
        add_special: bool,
        parse_special: bool,  # noqa: ARG002 - its special tokens have no text to parse
    ) -> tuple[Artifact, list[int]]:
        """One token a byte."""
        host = self._host(model, {Feature.TOKENIZE})
        return host.model.artifact, vocabulary.tokenize(text, add_special=add_special)

    async def detokenize(self, model: str, token_ids: Sequence[int], *, show_special: bool) -> str:
        """Text of tokens."""
        self._host(model, {Feature.TOKENIZE})
        self._check_ids(token_ids)
        return vocabulary.detokenize(token_ids, show_special=show_special)

    async def count_tokens(self, model: str, prompt: Prompt, tools: Sequence[Tool]) -> tuple[ModelStatus, int]:
        """Counts the bytes; tools have none."""
        host = self._host(model, {Feature.TOOLS} if tools else ())
        return self._status(host), len(vocabulary.prompt_tokens(prompt))

    # --- inside -----------------------------------------------------------------------------------------------------

    def _host(self, name: str, features: frozenset[Feature] | set[Feature] | tuple[()], sha256: str = "") -> _Host:
        if self._stopped:
            raise DrainingError("the engine is shutting down")
        status = select_model(self.models(), name, sha256=sha256, features=features)
        require_features(status, features)
        return self._hosts[status.artifact.name]

    def _status(self, host: _Host) -> ModelStatus:
        return next(status for status in self.models() if status.artifact.name == host.model.artifact.name)

    def _change(self, host: _Host, state: ModelState, error: str = "") -> None:
        host.state, host.error = state, error
        for callback in list(self._callbacks):
            callback()

    async def _load(self, host: _Host, context_length: int | None) -> None:
        self._change(host, ModelState.LOADING)
        try:
            size = host.model.artifact.size_bytes
            for step in range(1, 5):
                await asyncio.sleep(self._load_delay_s / 4)
                for progress in host.progress:
                    progress(Progress(Phase.LOADING, size * step // 4, size))
            if host.model.load_error is not None:
                raise host.model.load_error
        except BaseException as error:
            self._change(
                host, ModelState.FAILED if isinstance(error, ChorusError) else ModelState.AVAILABLE, str(error)
            )
            raise
        else:
            host.context_length = context_length or host.model.context_length
            self._change(host, ModelState.LOADED)
        finally:
            host.progress.clear()
            host.loading = None

    async def _loading(self, host: _Host) -> AsyncIterator[Progress]:
        queue: asyncio.Queue[Progress | None] = asyncio.Queue()
        task = asyncio.create_task(self.load(host.model.artifact.name, queue.put_nowait))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (progress := await queue.get()) is not None:
                yield progress
            await task
        finally:
            task.cancel()

    def _check(self, host: _Host, request: GenerationRequest, prompt: list[int]) -> None:
        if not prompt:
            raise InvalidRequestError("prompt", "is empty")
        self._check_ids(prompt)
        delivered = [len(choice.token_ids) for choice in request.resume]
        for choice in request.resume:
            self._check_ids(choice.token_ids)
            if choice.choice >= request.choice_count:
                raise InvalidRequestError("resume", f"choice {choice.choice} is not one of {request.choice_count}")
            if not choice.token_ids and choice.text and not request.allow_text_resume:
                raise UnsupportedFeatureError("resuming from text was not allowed", metadata={"feature": "resume"})
        if len(prompt) + max(delivered, default=0) >= host.context_length:
            raise PromptTooLongError(len(prompt), host.context_length, model=host.model.artifact.name)

    @staticmethod
    def _check_ids(token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if not vocabulary.exists(token_id):
                raise InvalidRequestError("token_ids", f"{token_id} is not in the vocabulary")

    @staticmethod
    async def _go_wrong(run: _Run, fault: Fault) -> None:
        if fault.kind == "fail":
            raise fault.error.with_traceback(None)
        await run.wait(asyncio.get_running_loop().create_future())

    @staticmethod
    def _take_slot(host: _Host, run: _Run) -> None:
        host.slots_used += 1
        run.has_slot = True
        if not run.admission.done():
            run.admission.set_result(None)

    @staticmethod
    def _abort_all(host: _Host) -> None:
        for run in host.runs:
            run.abort(DrainingError(f"{host.model.artifact.name} is being unloaded"))

    def _leave(self, host: _Host, run: _Run) -> None:
        host.runs.discard(run)
        host.room.remove(run)
        if run.has_slot:
            host.slots_used -= 1
            host.room.rate.finished(asyncio.get_running_loop().time())
        while host.slots_used < host.slots and (following := host.room.pop()) is not None:
            self._take_slot(host, following)
        if not host.slots_used:
            host.room.rate.idle()
        run.done.set_result(None)
