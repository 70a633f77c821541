"""The engine that runs GGUF models in this process."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from chorus.core.errors import (
    ChorusError,
    DrainingError,
    InvalidRequestError,
    PromptTooLongError,
    UnsupportedFeatureError,
)
from chorus.core.fleet.records import Artifact, EngineInfo, EngineKind, Feature, ModelLoad, ModelStatus
from chorus.core.generation import (
    Embedding,
    EmbeddingRequest,
    Event,
    GenerationRequest,
    Priority,
    Progress,
    Prompt,
    Ranked,
    Ranking,
    RerankRequest,
    Tool,
    ToolChoice,
)
from chorus.core.residency.devices import Machine
from chorus.engine.base import ProgressCallback
from chorus.engine.llama import binding
from chorus.engine.llama.adapters import AdapterShelf
from chorus.engine.llama.commands import Cancel, Embed, ForgetCache, Submit, Vector, Withdraw
from chorus.engine.llama.constraint import Matcher
from chorus.engine.llama.devices import DeviceReader
from chorus.engine.llama.host import Host
from chorus.engine.llama.job import Job, making_size
from chorus.engine.llama.loaded import Loaded
from chorus.engine.llama.prompt import text_size
from chorus.engine.llama.reading import TRUNCATIONS, Reading, TextReader
from chorus.engine.llama.request_check import check_request
from chorus.engine.llama.residents import Residents
from chorus.engine.llama.settings import LlamaSettings, ModelSource
from chorus.engine.llama.survival import Survival, failing_future
from chorus.engine.llama.turns import Turns
from chorus.engine.llama.worker import Worker
from chorus.engine.selection import require_features, select_model

T = TypeVar("T")
Item = TypeVar("Item", bound=Sized)
_NAME = "llama.cpp"
_LONG_TEXT = 100_000  # characters; about 50 ms
_READ_AT_ONCE = 20_000  # characters of short texts
_MADE_AT_ONCE = 10_000  # tokens of a request's choices; copying as many takes a fraction of a millisecond


class LlamaEngine:
    """Implements `chorus.engine.base.Engine` with llama.cpp in this process.

    Each loaded model has an owner thread (see `worker`) in which its streams are decoded together. Prompts are rendered
    and tokenized in a thread of their own, long ones in a second, and weights read in another, so none stalls a stream.
    """

    def __init__(
        self,
        sources: Sequence[ModelSource],
        settings: LlamaSettings | None = None,
        *,
        machine: Callable[[], Machine] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`machine` reads the memory that models may use, in a thread, and `clock` says how long one has been idle.

        Raises `ConfigError` where llama-cpp-python is missing, or a graphics device that the settings name. Of two
        sources with one name the last counts.
        """
        self._settings = settings or LlamaSettings()
        residency = self._settings.residency
        reader = machine or DeviceReader(residency, uses_gpus=self._settings.gpu_layers != 0)
        self._residents = Residents(self._settings, reader, clock=clock)
        self._turns = Turns(residency.max_decoding)
        self._info = EngineInfo(
            name=_NAME, version=binding.version(), kind=EngineKind.LOCAL, backends=binding.backends()
        )
        self._sources = tuple(sources)
        self._hosts: dict[str, Host] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._survival: Survival | None = None
        self._loader: ThreadPoolExecutor | None = None
        self._text: ThreadPoolExecutor | None = None
        self._long_text: ThreadPoolExecutor | None = None
        self._stopped = True

    # --- models -----------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""
        return self._info

    async def start(self) -> None:
        """Reads what each file says of itself; one that cannot be read is a failed model, not an error."""
        if not self._stopped:
            return
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="llama-load")
        self._text = ThreadPoolExecutor(1, thread_name_prefix="llama-text")
        self._long_text = ThreadPoolExecutor(1, thread_name_prefix="llama-long-text")
        self._survival = Survival(lambda: self._hosts.values(), self._settings.patience)
        self._survival.start()
        self._stopped = False
        self._residents.start(self._loader)
        await self.offer(self._sources)

    async def offer(self, sources: Sequence[ModelSource]) -> None:
        """From now on these are the models: new ones are read, and those not among them forgotten.

        A model in use stays as it is. Raises `DrainingError` where the engine does not run.
        """
        if self._stopped or self._loader is None or self._survival is None:
            raise DrainingError("the engine is shutting down")
        offered = {source.artifact.name: source for source in sources}
        kept = {
            name: host
            for name, host in self._hosts.items()
            if not host.is_idle or (name in offered and offered[name] == host.source)
        }
        fresh = [
            Host(
                source,
                self._settings,
                engine=_NAME,
                loader=self._loader,
                turns=self._turns,
                changed=self._on_changed,
                failed=self._residents.failed,
                again=self._load_again,
            )
            for name, source in offered.items()
            if name not in kept
        ]
        # Every host is asked, not only up to the first one that has changed.
        renewed = [kept[name].renew(source) for name, source in offered.items() if name in kept]
        for name in offered.keys() & kept.keys():
            self._residents.renewed(kept[name])
        if not fresh and kept.keys() == self._hosts.keys():
            if any(renewed):
                self._on_changed()
            return
        loop = asyncio.get_running_loop()
        for host in fresh:
            host.on_death = self._survival.died
            await loop.run_in_executor(self._loader, host.probe)
        # While those were read, somebody may have begun to use one that was to be forgotten.
        in_use = {name: host for name, host in self._hosts.items() if not host.is_idle}
        self._hosts = {**{host.name: host for host in fresh}, **kept, **in_use}
        self._on_changed()

    async def stop(self) -> None:
        """Ends every generation, unloads every model and joins every thread. May be called twice."""
        if self._stopped:
            return
        self._stopped = True
        if self._survival is not None:
            await self._survival.stop()
        await self._residents.stop()
        for pool in (self._loader, self._text, self._long_text):
            if pool is not None:
                # Loads were broken off, and who waits for a thread is refused, but a text that is being read is read to
                # its end: not on the event loop's time.
                await asyncio.to_thread(pool.shutdown, wait=True)

    def models(self) -> tuple[ModelStatus, ...]:
        """Every model, loaded or not, as it stands now."""
        return tuple(host.status for host in self._hosts.values())

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls `callback` on the event loop whenever what `models()` says has changed."""
        self._callbacks.append(callback)

    async def wait_broken(self) -> ChorusError:
        """Returns, while the engine runs, once its process has to be started again: a thread hangs, or dies every time.

        What waited for that thread has been ended by then.
        """
        if self._survival is None:
            raise DrainingError("the engine does not run")
        return await asyncio.shield(self._survival.broken)

    def load_report(self) -> tuple[ModelLoad, ...]:
        """The load of each loaded model, as of its last step."""
        reports = (host.load_report for host in self._hosts.values())
        return tuple(report for report in reports if report is not None)

    async def load(
        self, model: str, progress: ProgressCallback | None = None, *, context_length: int | None = None
    ) -> ModelStatus:
        """Loads a model; calls for the same one at the same time share one load."""
        if context_length is not None and context_length < 8:
            raise InvalidRequestError("context_length", "must be at least 8")
        host = self._host(model)
        async with self._in_memory(host, progress, context_length):
            return host.status

    async def unload(self, model: str, *, wait: bool = False) -> ModelStatus:
        """Unloads a model; its generations end with `DrainingError` unless `wait`."""
        host = self._host(model)
        await self._residents.unload(host, wait=wait)
        return host.status

    async def forget_cache(self) -> None:
        """Drops what finished sequences have left in memory for those that begin alike."""
        loop = asyncio.get_running_loop()
        for host in self._hosts.values():
            if host.in_memory:
                result: asyncio.Future[None] = loop.create_future()
                host.waiting.add(result, failing_future(result))
                host.loaded.worker.send(ForgetCache(result))
                try:
                    await result
                finally:
                    host.waiting.discard(result)

    # --- generation ---------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generates, as `Engine.generate` says. The steps of sampling are those of `sampling`."""
        arrived = time.monotonic()
        host = self._host(
            request.model, request.needed_features(), request.requirements.artifact_sha256, request.adapter
        )
        check_request(request)
        adapter_source = host.adapter_source(request.adapter) if request.adapter else None
        visit = self._residents.visit(host)
        shelf: AdapterShelf | None = None
        job: Job | None = None
        worker: Worker | None = None
        try:
            async for progress in visit.events():
                yield progress
            loaded = host.loaded
            load_s = time.monotonic() - arrived
            if not loaded.reader.facts.generates:
                raise UnsupportedFeatureError(
                    f"{host.name} makes vectors of text and cannot generate", metadata={"feature": "generate"}
                )
            tools = request.tools if request.tool_choice is not ToolChoice.NONE else ()
            read = loaded.reader.read
            prompt = await self._in_text_thread(read, request.prompt, tools, size=text_size(request.prompt))
            self._check_ids(host, loaded, request, len(prompt))
            adapter = None
            if adapter_source is not None:
                adapter = await loaded.shelf.take(adapter_source)
                shelf = loaded.shelf
            matchers: Sequence[Matcher] = ()
            if request.constraint is not None:
                # where long prompts are read: compiling takes a second at the first time, and at worst some seconds
                matchers = await self._in_text_thread(
                    loaded.reader.forms.matchers, request, loaded.end_tokens, size=_LONG_TEXT
                )
            make = partial(
                Job,
                request,
                model=loaded.model,
                artifact=host.artifact,
                prompt=prompt,
                seed=secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed,
                context_length=loaded.context_length,
                end_tokens=loaded.end_tokens,
                arrived=arrived,
                load_s=load_s,
                adapter=adapter,
                matchers=matchers,
            )
            size = making_size(request, len(prompt))
            job = await self._in_text_thread(make, size=size) if size > _MADE_AT_ONCE else make()
            worker = loaded.worker
            host.waiting.add(job, job.stream.push)
            worker.send(Submit(job))
            while (event := await job.stream.next()) is not None:
                yield event
        finally:
            if worker is not None and job is not None and not job.stream.ended:
                worker.send(Cancel(job))
            if shelf is not None and adapter_source is not None:
                shelf.give_back(adapter_source)
            host.waiting.discard(job)
            visit.end()

    # --- the rest -----------------------------------------------------------------------------------------------------

    async def embed(self, request: EmbeddingRequest) -> tuple[Artifact, Sequence[Embedding]]:
        """The vectors of the inputs, pooled as the model wants (its mean where it does not say)."""
        host = self._host(request.model, {Feature.EMBED}, request.requirements.artifact_sha256)
        _check_truncation(request.truncate)

        def read(reader: TextReader, items: Sequence[str | tuple[int, ...]]) -> list[Reading]:
            return reader.texts(items, request.truncate)

        readings, vectors = await self._vectors(
            host, request.inputs, read, normalize=request.normalize, priority=request.priority
        )
        return host.artifact, [
            Embedding(vector, len(reading.token_ids), reading.truncated)
            for reading, vector in zip(readings, vectors, strict=True)
        ]

    async def rerank(self, request: RerankRequest) -> tuple[Artifact, Ranking]:
        """The documents by the score that the model's own head gives each beside the query."""
        host = self._host(request.model, {Feature.RERANK}, request.requirements.artifact_sha256)
        _check_truncation(request.truncate)
        if request.top_n is not None and request.top_n < 1:
            raise InvalidRequestError("top_n", "must be at least 1")

        def read(reader: TextReader, documents: Sequence[str]) -> list[Reading]:
            return reader.pairs(request.query, documents, request.truncate)

        readings, scores = await self._vectors(
            host, request.documents, read, normalize=False, priority=request.priority
        )
        ranked = [
            Ranked(index, score[0], reading.truncated)
            for index, (reading, score) in enumerate(zip(readings, scores, strict=True))
        ]
        return host.artifact, Ranking.of(ranked, sum(len(reading.token_ids) for reading in readings), request.top_n)

    async def tokenize(
        self, model: str, text: str, *, add_special: bool, parse_special: bool
    ) -> tuple[Artifact, list[int]]:
        """Token ids of `text`, with the artifact whose vocabulary they are of."""
        host = self._host(model, {Feature.TOKENIZE})
        async with self._in_memory(host) as loaded:
            try:
                ids = await self._in_text_thread(
                    lambda: loaded.model.tokenize(text, add_special=add_special, parse_special=parse_special),
                    size=len(text),
                )
            except UnicodeEncodeError as error:
                raise InvalidRequestError("text", "holds half a surrogate pair, which is no Unicode text") from error
            return host.artifact, ids

    async def detokenize(self, model: str, token_ids: Sequence[int], *, show_special: bool) -> str:
        """Text of `token_ids`. Raises `InvalidRequestError` for an id outside of the vocabulary."""
        host = self._host(model, {Feature.TOKENIZE})
        async with self._in_memory(host) as loaded:
            _check_vocabulary(host, loaded, "token_ids", token_ids)
            return await self._in_text_thread(
                lambda: loaded.model.detokenize(token_ids, show_special=show_special), size=len(token_ids)
            )

    async def count_tokens(self, model: str, prompt: Prompt, tools: Sequence[Tool]) -> tuple[ModelStatus, int]:
        """How many tokens a prompt has after the model's template, with the model that would read it."""
        request = GenerationRequest(model, prompt, tuple(tools))
        host = self._host(model, request.needed_features())
        async with self._in_memory(host) as loaded:
            ids = await self._in_text_thread(loaded.reader.read, prompt, tools, size=text_size(prompt))
            return host.status, len(ids)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _host(
        self,
        name: str,
        features: frozenset[Feature] | set[Feature] = frozenset(),
        sha256: str = "",
        adapter: str = "",
    ) -> Host:
        if self._stopped:
            raise DrainingError("the engine is shutting down")
        status = select_model(self.models(), name, sha256=sha256, features=features, adapter=adapter)
        host = self._hosts[status.artifact.name]
        if host.facts.features:  # else its file cannot be read, which loading it will say
            require_features(status, features)
        return host

    @contextlib.asynccontextmanager
    async def _in_memory(
        self, host: Host, progress: ProgressCallback | None = None, context_length: int | None = None
    ) -> AsyncIterator[Loaded]:
        """Loads a model where it isn't, and keeps it for the length of the block."""
        visit = self._residents.visit(host, context_length)
        try:
            async for event in visit.events():
                if progress is not None and isinstance(event, Progress):
                    progress(event)
            yield host.loaded
        finally:
            visit.end()

    async def _load_again(self, host: Host, context_length: int) -> None:
        if self._hosts.get(host.name) is not host:  # it has been offered anew, or no more
            return
        with contextlib.suppress(InvalidRequestError):  # who waits for it has chosen another context
            async with self._in_memory(host, None, context_length):
                return

    async def _vectors(
        self,
        host: Host,
        items: Sequence[Item],
        read: Callable[[TextReader, Sequence[Item]], list[Reading]],
        *,
        normalize: bool,
        priority: Priority,
    ) -> tuple[list[Reading], list[Vector]]:
        """What the model reads of each item, and what it makes of it, in order."""
        async with self._in_memory(host) as loaded:
            reader = TextReader(loaded.model, host.name, loaded.embedding_length)
            readings: list[Reading] = []
            for part in _parts(items):
                readings += await self._in_text_thread(read, reader, part, size=sum(map(len, part)))
            if not readings:
                return [], []
            result: asyncio.Future[list[Vector]] = asyncio.get_running_loop().create_future()
            worker = loaded.worker
            command = Embed([reading.token_ids for reading in readings], normalize, priority, result)
            host.waiting.add(command, failing_future(result))
            worker.send(command)
            try:
                return readings, await result
            except asyncio.CancelledError:
                worker.send(Withdraw(command))
                raise
            finally:
                host.waiting.discard(command)

    async def _in_text_thread(self, call: Callable[..., T], *arguments: object, size: int) -> T:
        """Runs what reads a text of about `size` characters; long ones, which take seconds, have their own queue."""
        thread = self._text if size < _LONG_TEXT else self._long_text
        if thread is None or self._stopped:
            raise DrainingError("the engine is shutting down")
        return await asyncio.get_running_loop().run_in_executor(thread, self._unless_stopped, call, *arguments)

    def _unless_stopped(self, call: Callable[..., T], *arguments: object) -> T:
        if self._stopped:  # while it waited in the thread's queue
            raise DrainingError("the engine is shutting down")
        return call(*arguments)

    def _on_changed(self) -> None:
        for callback in list(self._callbacks):
            callback()

    @staticmethod
    def _check_ids(host: Host, loaded: Loaded, request: GenerationRequest, prompt_tokens: int) -> None:
        for delivered in request.resume:
            _check_vocabulary(host, loaded, "resume", delivered.token_ids)
        _check_vocabulary(host, loaded, "logit_bias", request.sampling.logit_bias)
        longest = prompt_tokens
        if not request.context_shift:
            longest += max((len(delivered.token_ids) for delivered in request.resume), default=0)
        if prompt_tokens >= loaded.context_length or longest > loaded.context_length:
            raise PromptTooLongError(longest, loaded.context_length, model=host.name)


def _check_vocabulary(host: Host, loaded: Loaded, field: str, token_ids: Collection[int]) -> None:
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < loaded.model.vocabulary_size:
            raise InvalidRequestError(field, f"{token_id} is not in the vocabulary of {host.name}")


def _check_truncation(truncate: str | None) -> None:
    if truncate not in TRUNCATIONS:
        raise InvalidRequestError("truncate", f"{truncate!r} is neither start nor end")


def _parts(items: Sequence[Item]) -> Iterator[list[Item]]:
    """The items in runs short enough that nobody waits long for the thread for texts; a long one by itself."""
    part: list[Item] = []
    size = 0
    for item in items:
        if part and size + len(item) > _READ_AT_ONCE:
            yield part
            part, size = [], 0
        part.append(item)
        size += len(item)
    if part:
        yield part
