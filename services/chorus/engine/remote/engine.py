"""The engine that hands its work to a server behind HTTP."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial

from chorus.config.remote import RemoteKind
from chorus.core.errors import (
    ChorusError,
    ConfigError,
    DrainingError,
    EngineError,
    InvalidRequestError,
    PromptTooLongError,
    UnavailableError,
    UnknownModelError,
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
    Finished,
    GenerationRequest,
    Progress,
    Prompt,
    Queued,
    Ranking,
    RerankRequest,
    TextPrompt,
    Tool,
)
from chorus.engine.base import ProgressCallback
from chorus.engine.remote.answer import Answer
from chorus.engine.remote.dialect import SEED_LIMIT, Dialect, Found, unsupported
from chorus.engine.remote.failures import NoAnswerError, RefusedKeyError, broken
from chorus.engine.remote.host import Host
from chorus.engine.remote.http import Asked, Http
from chorus.engine.remote.ollama import OllamaDialect
from chorus.engine.remote.openai import OpenAiDialect
from chorus.engine.remote.settings import RemoteSettings
from chorus.engine.remote.slots import Run
from chorus.engine.selection import require_features, select_model
from chorus.telemetry.logs import get_logger

_POLL_S = 1.0
_POLL_EXTERNAL_S = 30.0

_log = get_logger()


class RemoteEngine:
    """Implements `chorus.engine.base.Engine`. All of it runs on the event loop that starts it.

    The server is asked about its models every `poll_s`. While it can't be reached, there are no models, and requests
    end with `UnavailableError`; it comes back by itself.
    """

    def __init__(self, settings: RemoteSettings) -> None:
        """May take tens of milliseconds, as it reads the authorities that HTTPS trusts."""
        server = settings.server
        self._settings = settings
        self._http = Http(settings)
        dialect = OllamaDialect if server.kind is RemoteKind.OLLAMA else OpenAiDialect
        self._dialect: Dialect = dialect(self._http, settings)
        self._poll_s = settings.poll_s or (_POLL_S if server.is_household else _POLL_EXTERNAL_S)
        self._info = self._described(server.kind.value, "")
        self._hosts: dict[str, Host] = {}
        self._leaving: list[Host] = []  # no longer listed by the server, and not idle yet
        self._down: ChorusError | None = UnavailableError(f"{self._http.server} was not asked yet")
        self._callbacks: list[Callable[[], None]] = []
        self._watching: asyncio.Task[None] | None = None
        self._look_now = asyncio.Event()
        self._changes = 0  # made here: what the server said before one is old
        self._stopped = False
        self._random = random.Random()  # the global generator belongs to whoever embeds this

    # --- what there is ----------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""
        return self._info

    async def start(self) -> None:
        """Asks the server what it has; one that can't be reached yet is waited for in the background.

        Raises ConfigError where it refuses the API key.
        """
        await self._look()
        if isinstance(self._down, RefusedKeyError):
            await self._http.close()
            raise ConfigError(f"runner.remote: {self._down.message}", metadata={"keys": "runner.remote_api_key_file"})
        self._watching = asyncio.create_task(self._watch(), name="remote-watch")

    async def stop(self) -> None:
        """Ends every generation with `DrainingError` and closes every connection. The server keeps its models."""
        self._stopped = True
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        loading = [host.loading for host in self._every_host() if host.loading is not None]
        for host in self._every_host():
            host.abort(DrainingError("the engine is shutting down"))
        if loading:
            await asyncio.wait(loading)
        await self._http.close()

    def models(self) -> tuple[ModelStatus, ...]:
        """Every model of the server; none while it can't be reached."""
        return () if self._down is not None else tuple(host.status for host in self._hosts.values())

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls `callback` whenever what `models()` says has changed."""
        self._callbacks.append(callback)

    def load_report(self) -> tuple[ModelLoad, ...]:
        """What this runner has given the server to do; what others give it is not told."""
        return () if self._down is not None else tuple(h.load for h in self._hosts.values() if h.is_loaded())

    # --- loading ----------------------------------------------------------------------------------------------------

    async def load(
        self, model: str, progress: ProgressCallback | None = None, *, context_length: int | None = None
    ) -> ModelStatus:
        """Loads a model where the server can be told to (Ollama); others have theirs for as long as they run."""
        host = self._host(model)
        if not host.is_loaded() and self._dialect.loads:
            if host.loading is None:
                host.loading = asyncio.create_task(self._load(host, context_length))
                host.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
            if progress is not None:
                host.waiting_for_load.append(progress)
            await asyncio.shield(host.loading)
        return host.status

    async def unload(self, model: str, *, wait: bool = False) -> ModelStatus:
        """Unloads a model (Ollama), whoever else uses it there. Raises `UnsupportedFeatureError` at other servers."""
        host = self._host(model)
        if not self._dialect.loads:
            await self._dialect.unload(host.model)  # refuses, and nobody's stream has ended for it
        elif wait:
            await asyncio.gather(*(run.done for run in host.slots.runs))
        else:
            host.slots.abort_all(DrainingError(f"{host.model.status.artifact.name} is being unloaded"))
        await self._dialect.unload(host.model)
        self._change(host, ModelState.AVAILABLE)
        return host.status

    async def _load(self, host: Host, context_length: int | None) -> None:
        host.load_run = Run()
        self._change(host, ModelState.LOADING)
        state = ModelState.AVAILABLE
        try:
            await asyncio.sleep(0)  # whoever asked for this load is listening from here on
            host.tell(done=False)
            await host.load_run.wait(self._dialect.load(host.model, context_length))
            state = ModelState.LOADED
            host.tell(done=True)
        finally:
            host.loading = host.load_run = None
            host.waiting_for_load.clear()
            self._change(host, state)
            self._look_now.set()

    async def _loaded(self, host: Host) -> AsyncIterator[Progress]:
        """Loads a model and tells how it goes."""
        told: asyncio.Queue[Progress | None] = asyncio.Queue()
        task = asyncio.create_task(self.load(host.model.status.artifact.name, told.put_nowait))
        task.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (progress := await told.get()) is not None:
                yield progress
            await task
        finally:
            task.cancel()

    # --- work -------------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generates, as `Engine.generate` says. Closing this closes the server's stream."""
        host = self._host(request.model, request.needed_features(), request.requirements.artifact_sha256)
        if isinstance(request.prompt, TextPrompt) and not request.prompt.text:
            raise InvalidRequestError("prompt", "is empty")
        drawn, wanted = self._random.randrange(SEED_LIMIT), request.sampling.seed
        seed = drawn if wanted is None else wanted
        call = self._dialect.generation(host.model, request, seed % SEED_LIMIT)
        clock = asyncio.get_running_loop().time
        arrived = clock()
        answer_of = partial(
            Answer, host.status, request, seed, match_stops=call.counts, echo=call.echo, arrived=arrived
        )
        if (answer := answer_of(admitted=arrived, load_s=0.0)).ended:  # all of it was delivered: nobody need be asked
            for event in answer.finish(arrived):
                yield event
            return
        with host.slots.entered() as run:
            if not host.is_loaded() and self._dialect.loads:
                async for progress in self._loaded(host):
                    yield progress
            load_s = clock() - arrived
            position = host.slots.admit(run, request.priority)
            if position is not None:
                yield Queued(position, host.slots.room.rate.wait_s(position + 1))
                await run.wait(run.admission)
            answer = answer_of(admitted=clock(), load_s=load_s)
            reader = self._dialect.reader(host.model)
            async with AsyncExitStack() as stack:
                try:
                    opening = self._http.lines(call.path, call.body, self._asked(host))
                    lines = await run.wait(stack.enter_async_context(opening))
                    host.heard()
                    while not answer.ended and (line := await self._next_line(run, lines, answer)) is not None:
                        host.heard()
                        for event in answer.take(reader.read(line), clock()):
                            yield event
                except (UnavailableError, UnknownModelError):
                    self._look_now.set()
                    raise
            for event in answer.finish(clock()):
                if isinstance(event, Finished):
                    host.measured(event.timings.tokens_per_second)
                yield event

    async def _next_line(self, run: Run, lines: AsyncIterator[bytes], answer: Answer) -> bytes | None:
        """The next line of a stream; None at its end, or where the answer is whole and no more is heard of it.

        Raises `NoAnswerError` after a silence that is too long.
        """
        limit_s = answer.patience_s(asyncio.get_running_loop().time(), self._settings.token_timeout_s)
        try:
            return await run.wait(anext(lines, None), limit_s)
        except TimeoutError:
            if answer.is_whole:
                return None
            problem = f"it fell silent in the middle of an answer, for {limit_s:g} s (runner.remote_token_timeout_s)"
            raise broken(self._http.server, problem, slow=True) from None
        except UnavailableError:
            if answer.is_whole:
                return None
            raise

    async def embed(self, request: EmbeddingRequest) -> tuple[Artifact, Sequence[Embedding]]:
        """The vectors of the inputs. Each is asked for by itself, so that its tokens are known."""
        host = self._host(request.model, {Feature.EMBED}, request.requirements.artifact_sha256)
        texts = [item for item in request.inputs if isinstance(item, str)]
        if len(texts) < len(request.inputs):
            raise unsupported(host.model, Feature.TOKEN_INPUT, "embed token ids")
        await self.load(host.model.status.artifact.name)
        with host.slots.entered() as run:
            if host.slots.admit(run, request.priority) is not None:
                await run.wait(run.admission)
            embeddings = await run.wait(self._embed_all(host, texts, request))
        return host.model.status.artifact, embeddings

    async def _embed_all(self, host: Host, texts: Iterable[str], request: EmbeddingRequest) -> list[Embedding]:
        places = asyncio.Semaphore(host.slots.total)

        async def one(text: str) -> Embedding:
            async with places:
                return await self._embed(host, text, request)

        tasks = [asyncio.create_task(one(text)) for text in texts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _embed(self, host: Host, text: str, request: EmbeddingRequest) -> Embedding:
        truncated = False
        try:
            values, count = await self._dialect.embed(host.model, text, False)
        except PromptTooLongError:
            if request.truncate is None:
                raise
            if request.truncate != "end":
                raise unsupported(host.model, Feature.EMBED, "cut off the start of a text") from None
            truncated = True
            values, count = await self._dialect.embed(host.model, text, True)
        host.heard()
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise EngineError(f"{self._http.server} sent a vector that is not made of numbers")
        norm = math.hypot(*values) if request.normalize else 1.0
        return Embedding(tuple(value / (norm or 1.0) for value in values), count, truncated)

    async def rerank(self, request: RerankRequest) -> tuple[Artifact, Ranking]:
        """Raises `UnsupportedFeatureError`: no server is asked for scores."""
        model = self._host(request.model, (), request.requirements.artifact_sha256).model
        raise unsupported(model, Feature.RERANK, "rerank documents")

    async def tokenize(
        self,
        model: str,
        text: str,  # noqa: ARG002
        *,
        add_special: bool,  # noqa: ARG002
        parse_special: bool,  # noqa: ARG002
    ) -> tuple[Artifact, list[int]]:
        """Raises `UnsupportedFeatureError`: servers deal in text."""
        raise self._deals_in_text(model)

    async def detokenize(self, model: str, token_ids: Sequence[int], *, show_special: bool) -> str:  # noqa: ARG002
        """Raises `UnsupportedFeatureError`: servers deal in text."""
        raise self._deals_in_text(model)

    async def count_tokens(self, model: str, prompt: Prompt, tools: Sequence[Tool]) -> tuple[ModelStatus, int]:  # noqa: ARG002
        """Raises `UnsupportedFeatureError`: servers deal in text."""
        raise self._deals_in_text(model)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _deals_in_text(self, model: str) -> UnsupportedFeatureError:
        return unsupported(self._host(model).model, Feature.TOKENIZE, "tell its tokens")

    def _host(self, name: str, features: Iterable[Feature] = (), sha256: str = "") -> Host:
        if self._stopped:
            raise DrainingError("the engine is shutting down")
        if self._down is not None:
            self._look_now.set()
            raise UnavailableError(self._down.message)
        needed = frozenset(features)
        status = select_model(self.models(), name, sha256=sha256, features=needed)
        require_features(status, needed)
        return self._hosts[status.artifact.name]

    def _every_host(self) -> list[Host]:
        return [*self._hosts.values(), *self._leaving]

    def _asked(self, host: Host) -> Asked:
        status = host.model.status
        return Asked(status.artifact.name, status.context_length, ", ".join(sorted(self._hosts)))

    def _described(self, name: str, version: str) -> EngineInfo:
        server = self._settings.server
        kind = EngineKind.REMOTE if server.is_household else EngineKind.EXTERNAL
        return EngineInfo(name=name, version=version, kind=kind, plaintext=server.is_plaintext)

    def _change(self, host: Host, state: ModelState) -> None:
        self._changes += 1
        if host.state is not state:
            host.state = state
            self._tell()

    def _tell(self) -> None:
        for callback in list(self._callbacks):
            callback()

    async def _watch(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._look_now.wait()
            self._look_now.clear()
            await self._look()
            # However often somebody wants to know, a dead server is not asked more often than this.
            await asyncio.sleep(min(self._poll_s, 0.1))

    async def _look(self) -> None:
        """Asks the server once, and takes what it says."""
        changes, began = self._changes, asyncio.get_running_loop().time()
        try:
            found = await self._dialect.find()
        except ChorusError as error:
            self._lost(error, began)
        except Exception as error:
            _log.exception("remote.broken", server=self._http.server)
            self._lost(EngineError(f"{self._http.server} said what makes no sense: {type(error).__name__}"), began)
        else:
            if changes == self._changes:
                self._take(found)

    def _lost(self, error: ChorusError, began: float) -> None:
        # A server may be too busy to answer questions; who is being answered meanwhile knows that it lives.
        if isinstance(error, NoAnswerError) and any(host.heard_since(began) for host in self._every_host()):
            return
        if isinstance(error, UnavailableError):
            for host in self._every_host():
                host.abort(UnavailableError(error.message))
        if self._down is None or self._down.message != error.message:
            _log.warning("remote.lost", server=self._http.server, why=error.message)
        was_down, self._down = self._down is not None, error
        if not was_down:
            self._tell()

    def _take(self, found: Found) -> None:
        before = (self._info, self.models())
        # By its id: the name that it goes by here depends on what else there is.
        known = {host.model.id: host for host in self._every_host()}
        hosts: dict[str, Host] = {}
        for model in found.models:
            host = known.get(model.id)
            if host is None:
                host = Host(model, self._settings.max_queue)
            host.update(model)
            hosts[model.status.artifact.name] = host
        listed = set(hosts.values())
        self._leaving = [host for host in known.values() if host not in listed and host.is_busy()]
        if self._down is not None:
            _log.info("remote.found", server=self._http.server, version=found.version, models=len(hosts))
        self._hosts, self._down = hosts, None
        self._info = self._described(found.name, found.version)
        if before != (self._info, self.models()):
            self._tell()
