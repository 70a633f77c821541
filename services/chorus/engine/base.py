"""The interface of an engine: what a runner asks of llama.cpp, of a server behind HTTP, or of the fake one.

All methods are called on the runner's event loop and never block it. An engine does its work elsewhere: in its owner
thread, or in another process. Every error raised is a `ChorusError`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from chorus.core.fleet.records import Artifact, EngineInfo, ModelLoad, ModelStatus
from chorus.core.generation import (
    Embedding,
    EmbeddingRequest,
    Event,
    GenerationRequest,
    Progress,
    Prompt,
    Ranking,
    RerankRequest,
    Tool,
)

ProgressCallback = Callable[[Progress], None]


class Engine(Protocol):
    """One engine of a runner, hosting any number of models.

    Models are named by artifact name or family; an unknown one raises `UnknownModelError` naming those there are. Every
    method that takes a model loads it first where that is allowed and needed.
    """

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""
        ...

    async def start(self) -> None:
        """Finds its models. Raises `ConfigError` or `EngineError` where it cannot work at all."""
        ...

    async def stop(self) -> None:
        """Ends every generation, unloads every model and joins every thread. May be called twice."""
        ...

    def models(self) -> tuple[ModelStatus, ...]:
        """Every model, loaded or not, as it stands now."""
        ...

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls `callback` on the event loop whenever what `models()` says has changed."""
        ...

    def load_report(self) -> tuple[ModelLoad, ...]:
        """The load of each loaded model now; cheap enough for every heartbeat."""
        ...

    async def load(
        self, model: str, progress: ProgressCallback | None = None, *, context_length: int | None = None
    ) -> ModelStatus:
        """Loads a model; calls for the same one at the same time share one load.

        `progress` is called on the event loop. Without `context_length`, in tokens, the model is taken as it is. An
        engine that chooses contexts itself raises `InvalidRequestError` where the model has another one, or is being
        loaded with another. Raises `ModelFileError`, `OutOfMemoryError`, `UnknownModelError`, too.
        """
        ...

    async def unload(self, model: str, *, wait: bool = False) -> ModelStatus:
        """Unloads a model; its generations end with `DrainingError` unless `wait`, which lets them finish first."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generates. The order of events is that of inference.v1's GenerationEvent.

        Closing the generator (`aclose`, or cancelling the task that reads it and then closing it) frees the slot within
        one decode step. Raises `InvalidRequestError`, `PromptTooLongError`, `UnsupportedFeatureError`,
        `OverloadedError`, `EngineError` and those of `load`, all before or instead of the next event.
        """
        ...

    async def embed(self, request: EmbeddingRequest) -> tuple[Artifact, Sequence[Embedding]]:
        """The vectors of the inputs, in order, with the artifact that made them. Raises as `generate`."""
        ...

    async def rerank(self, request: RerankRequest) -> tuple[Artifact, Ranking]:
        """The documents by how well they answer the query, with the artifact that scored them. Raises as `generate`."""
        ...

    async def tokenize(
        self, model: str, text: str, *, add_special: bool, parse_special: bool
    ) -> tuple[Artifact, list[int]]:
        """Token ids of `text`, with the artifact whose vocabulary they are of."""
        ...

    async def detokenize(self, model: str, token_ids: Sequence[int], *, show_special: bool) -> str:
        """Text of `token_ids`. Raises `InvalidRequestError` for an id outside of the vocabulary."""
        ...

    async def count_tokens(self, model: str, prompt: Prompt, tools: Sequence[Tool]) -> tuple[ModelStatus, int]:
        """How many tokens a prompt has after the model's template, with the model that would read it."""
        ...
