"""The client for code without an event loop: the same methods, run on a loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from chorus.client.answers import (
    Completion,
    EmbeddingAnswer,
    MeshModels,
    MeshNodes,
    PlacementExplanation,
    RerankAnswer,
    TokenCountAnswer,
)
from chorus.client.caching import MeshCache
from chorus.client.costs import MeshCosts
from chorus.client.ensembles import EnsembleCompletion, EnsembleEvent, EnsembleGeneration
from chorus.client.learning import MeshLearning
from chorus.client.mesh import MeshClient
from chorus.client.requests import Asked
from chorus.client.statistics import MeshStats
from chorus.client.stream import Generation
from chorus.config import ChorusConfig
from chorus.core.costs.records import Grouping
from chorus.core.ensemble.records import EnsembleSpec
from chorus.core.fleet.listing import NodeFilter
from chorus.core.generation import EmbeddingRequest, RerankRequest
from chorus.wire.events import ClientEvent

T = TypeVar("T")
Events = TypeVar("Events", bound=Generation | EnsembleGeneration)


class _SyncEvents(Generic[Events, T]):
    """Events for a plain `for`. Leaving its `with` block ends what makes them."""

    def __init__(self, client: SyncMeshClient, events: Events) -> None:
        self._client = client
        self._events = events

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        event: T | None = self._client.run(_next(self._events))
        if event is None:
            raise StopIteration
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends it."""
        self._client.run(self._events.aclose())


class SyncGeneration(_SyncEvents[Generation, ClientEvent]):
    """Events as `Generation` has them."""


class SyncEnsemble(_SyncEvents[EnsembleGeneration, EnsembleEvent]):
    """Events as `EnsembleGeneration` has them."""

    def completion(self) -> EnsembleCompletion:
        """Reads to the end and returns the answer and its verdict."""
        return self._client.run(self._events.completion())


class SyncMeshClient:
    """`MeshClient` without `await`; use it as `with`, or call `close()`. Threads may share it."""

    def __init__(self, config: ChorusConfig) -> None:
        """A client as the configuration says. Raises as `MeshClient.from_config`."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chorus-client", daemon=True)
        self._thread.start()
        try:
            self._client = self.run(_make(config))
        except BaseException:
            self._end_loop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what goes on and closes the connections. May be called again."""
        if not self._loop.is_closed():
            self.run(self._client.aclose())
            self._end_loop()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the client's loop, and returns or raises what it does."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # the waiting thread was interrupted
            raise

    def generate(self, asked: Asked, **options: Any) -> SyncGeneration:
        """Generates, event by event; the options are those of `MeshClient.generate`."""
        return SyncGeneration(self, self._client.generate(asked, **options))

    def ensemble(self, asked: Asked, ensemble: EnsembleSpec, **options: Any) -> SyncEnsemble:
        """Has several models answer, event by event; the options are those of `MeshClient.ensemble`."""
        return SyncEnsemble(self, self._client.ensemble(asked, ensemble, **options))

    def complete(self, asked: Asked, **options: Any) -> Completion:
        """Generates, and returns the whole."""
        return self.run(self._client.complete(asked, **options))

    def embed(self, asked: str | Sequence[str] | EmbeddingRequest, *, model: str = "") -> EmbeddingAnswer:
        """Vectors of a text or several, in order."""
        return self.run(self._client.embed(asked, model=model))

    def rerank(
        self, query: str | RerankRequest, documents: Sequence[str] = (), *, model: str = "", top_n: int | None = None
    ) -> RerankAnswer:
        """The documents by how well they answer the query, or the best `top_n` of them."""
        return self.run(self._client.rerank(query, documents, model=model, top_n=top_n))

    def count_tokens(self, asked: Asked, *, model: str = "") -> TokenCountAnswer:
        """How many tokens a prompt has."""
        return self.run(self._client.count_tokens(asked, model=model))

    def list_models(self) -> MeshModels:
        """The models of the mesh, and where they are."""
        return self.run(self._client.list_models())

    def list_nodes(self, condition: NodeFilter | None = None) -> MeshNodes:
        """Every node with those of its runners that match."""
        return self.run(self._client.list_nodes(condition))

    def cache(self) -> MeshCache:
        """What every coordinator's answer cache holds of this caller, and has done."""
        return self.run(self._client.cache())

    def clear_cache(self, *, everybody: bool = False) -> Mapping[str, int]:
        """Forgets this caller's answers at every coordinator, or everybody's (admins); how many, by coordinator."""
        return self.run(self._client.clear_cache(everybody=everybody))

    def costs(self, *, by: Grouping = Grouping.DAY, days: int | None = None, latest: int = 0) -> MeshCosts:
        """What this caller's requests cost, for an admin everybody's: of today and `days` before, or of this month. So
        many of the latest ones are told by themselves."""
        return self.run(self._client.costs(by=by, days=days, latest=latest))

    def rate(self, request_id: str, rating: float) -> None:
        """Says how good an answer of an ensemble was, 0 to 1, to the coordinator that gave it, so that it may learn."""
        self.run(self._client.rate(request_id, rating))

    def learning(self) -> MeshLearning:
        """What every coordinator has learnt of models and strategies."""
        return self.run(self._client.learning())

    def change_learning(self, *, frozen: bool | None = None, reset: bool = False) -> None:
        """Freezes what was learnt everywhere, or learns on, or forgets it; for admins."""
        self.run(self._client.change_learning(frozen=frozen, reset=reset))

    def stats(self) -> MeshStats:
        """How requests fared in the last minutes, at every coordinator that answers."""
        return self.run(self._client.stats())

    def explain_placement(self, asked: Asked, *, model: str = "") -> PlacementExplanation:
        """Where a generation would go now, and why not elsewhere."""
        return self.run(self._client.explain_placement(asked, model=model))

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _make(config: ChorusConfig) -> MeshClient:
    return MeshClient.from_config(config)


async def _next(events: Generation | EnsembleGeneration) -> Any:
    return await anext(events, None)
