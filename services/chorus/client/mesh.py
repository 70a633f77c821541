"""The asynchronous client of a mesh."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.client.answers import (
    Completion,
    EmbeddingAnswer,
    MeshModels,
    MeshNodes,
    PlacementExplanation,
    RerankAnswer,
    TokenCountAnswer,
    decode_registry,
)
from chorus.client.caching import MeshCache, cache_of, clear_caches
from chorus.client.carrying import Carrying
from chorus.client.coordinators import Coordinators, metadata_now
from chorus.client.costs import MeshCosts, costs_of
from chorus.client.direct import Direct, DirectMode
from chorus.client.ensembles import EnsembleCarrying, EnsembleEvent, EnsembleGeneration, answer_of
from chorus.client.events import EventNews, watch_all
from chorus.client.generating import Generating
from chorus.client.keys import MeshKeys
from chorus.client.learning import MeshLearning, change_learning, learning_of, rate_answer
from chorus.client.requests import Asked, chat_request, embedding_request, rerank_request
from chorus.client.statistics import MeshStats, stats_of
from chorus.client.stream import Generation
from chorus.config import ChorusConfig, Endpoint
from chorus.core.cache.policy import CacheMode
from chorus.core.costs.records import Asked as CostsAsked
from chorus.core.costs.records import Grouping
from chorus.core.ensemble.records import EnsembleSpec
from chorus.core.errors import ConfigError
from chorus.core.events import EventFilter
from chorus.core.fleet.events import DirectoryEvent
from chorus.core.fleet.listing import MAX_PAGE_SIZE, NodeEntry, NodeFilter
from chorus.core.generation import EmbeddingRequest, Fallback, GenerationRequest, Requirements, RerankRequest
from chorus.core.resilience.retries import RetryBudget
from chorus.transport import TlsIdentity
from chorus.transport.bearer import Bearer
from chorus.transport.keeping import CertificateKeeper
from chorus.transport.tls import CA_FILE
from chorus.wire.cache import encode_policy
from chorus.wire.directory import decode_directory_event, decode_node_entry, encode_filter
from chorus.wire.embedding import encode_embedding
from chorus.wire.ensemble import encode_ensemble
from chorus.wire.fallback import encode_fallback
from chorus.wire.generation import encode_generation
from chorus.wire.rerank import encode_rerank

DEFAULT_TIMEOUT_S = 300.0


class MeshClient:
    """A client of one mesh, for one event loop; use it as `async with`, or call `aclose()`.

    Every method raises ChorusErrors whose text says what to do. Requests are spread over the coordinators. One that is
    lost, even in the middle of an answer, is replaced by another one, which goes on where the first one stopped.
    `timeout_s` bounds each request, in seconds, whoever answers it.
    """

    def __init__(
        self,
        coordinators: Sequence[Endpoint],
        *,
        identity: TlsIdentity | Bearer | None,
        insecure_loopback: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        direct: DirectMode = "auto",
    ) -> None:
        """`identity` None is for a mesh without TLS on this machine, and needs `insecure_loopback`. With a key (Bearer)
        answers are always relayed: runners know callers by certificates alone.

        `direct`: whether answers are streamed from runners themselves, with no hop between. `auto`: from the second
        generation on, and relayed where a runner can't be reached from here; `never`; or `always`.
        """
        self._timeout_s = timeout_s
        self._coordinators = Coordinators(
            coordinators, identity=identity, insecure_loopback=insecure_loopback, timeout_s=timeout_s
        )
        shown = identity if isinstance(identity, TlsIdentity) else None
        mode: DirectMode = "never" if isinstance(identity, Bearer) else direct
        self._direct = Direct(mode, self._coordinators, identity=shown)
        # For what only each of them knows of itself; nothing is dialled before it is asked for.
        self._each = [
            (
                str(endpoint.named("coordinator")),
                Coordinators([endpoint], identity=identity, insecure_loopback=insecure_loopback, timeout_s=timeout_s),
            )
            for endpoint in coordinators
        ]
        self._budget = RetryBudget()
        self._keeper: CertificateKeeper | None = None
        self._keeping: asyncio.Task[None] | None = None

    @classmethod
    def from_config(cls, config: ChorusConfig) -> MeshClient:
        """A client as the configuration says. One that joined renews its certificate while it is used as `async with`.

        Raises CertificateError where its certificate, or the authority's, is missing or bad, ConfigError for a bad key.
        """
        mesh, settings = config.mesh, config.client
        if settings.api_key_file is not None:
            return cls(settings.coordinators, identity=_bearer_of(config), timeout_s=settings.timeout_s)
        directory = mesh.certs_dir / settings.identity
        identity = None if mesh.insecure_loopback else TlsIdentity.load(directory, even_ended=mesh.renewal is not None)
        client = cls(
            settings.coordinators,
            identity=identity,
            insecure_loopback=mesh.insecure_loopback,
            timeout_s=settings.timeout_s,
            direct=settings.direct,
        )
        if identity is not None and mesh.renewal is not None:
            client._keeper = CertificateKeeper(identity, directory, renewal=mesh.renewal, service=mesh.identity_service)
        return client

    @classmethod
    def connect(
        cls,
        *coordinators: str,
        certificates: Path | str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        direct: DirectMode = "auto",
        renewal: str | None = None,
    ) -> MeshClient:
        """A client of coordinators given as `[NAME@]HOST:PORT`, showing the certificate in that folder.

        While it is used as `async with`, it takes over files that are replaced there, and renews the certificate itself
        at `renewal`, `[NAME@]HOST:PORT` of where machines join, if that is given; one that has ended already, too.
        """
        directory = Path(certificates).expanduser()
        identity = TlsIdentity.load(directory, even_ended=renewal is not None)
        endpoints = [Endpoint.parse(text) for text in coordinators]
        client = cls(endpoints, identity=identity, timeout_s=timeout_s, direct=direct)
        where = None if renewal is None else Endpoint.parse(renewal)
        client._keeper = CertificateKeeper(identity, directory, renewal=where)
        return client

    @classmethod
    def with_key(
        cls, *coordinators: str, api_key_file: Path | str, ca: str, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> MeshClient:
        """A client without a certificate, of coordinators' listeners for those (callers.listen).

        `api_key_file` holds an API key, or an identity provider's token; `ca` is a file with the mesh's authority, or
        its SHA-256 fingerprint. Raises ConfigError, CertificateError, and UnavailableError where the first coordinator
        can't be met to compare a fingerprint.
        """
        endpoints = [Endpoint.parse(text) for text in coordinators]
        bearer = Bearer.known_by(Path(api_key_file).expanduser(), ca, endpoints[0])
        return cls(endpoints, identity=bearer, timeout_s=timeout_s)

    async def __aenter__(self) -> Self:
        if self._keeper is not None:
            await self._keeper.renew_if_ended()
            self._keeping = asyncio.create_task(self._keeper.run(), name="keep the certificate")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends what goes on and closes the connections."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
        await self._direct.close()
        await self._coordinators.close()
        for _, coordinator in self._each:
            await coordinator.close()

    # --- generating -------------------------------------------------------------------------------------------------

    def generate(
        self,
        asked: Asked,
        *,
        model: str = "",
        instructions: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        adapter: str = "",
        requirements: Requirements | None = None,
        allow_hedging: bool = False,
        fallback: Fallback | None = None,
        ensemble: EnsembleSpec | None = None,
        cache: CacheMode | None = None,
        timeout_s: float | None = None,
    ) -> Generation:
        """Generates, event by event; nothing is sent before the first one is asked for. See `chat_request`.

        `allow_hedging`: a second runner may be asked where the first one is late; such a generation is relayed.
        `fallback`: what may be done where no runner can serve it as asked; Substitution tells of another model.
        `ensemble`: several models think, and their answer alone is told; `MeshClient.ensemble` tells of the members.
        `cache`: whether an earlier answer may be given again; CacheReport tells of it. Such a generation is relayed.
        """
        request = chat_request(
            asked,
            model=model,
            instructions=instructions,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            adapter=adapter,
            requirements=requirements,
        )
        message = pb.GenerateRequest(
            spec=encode_generation(request),
            attempt=1,
            allow_hedging=allow_hedging,
            fallback=encode_fallback(fallback) if fallback is not None else None,
            cache=encode_policy(cache) if cache is not None else None,
        )
        if ensemble is None:
            carrying = Carrying(message, request, lambda: self._coordinators.now)
            return Generation(self._events(carrying, timeout_s or self._timeout_s))
        final = replace(ensemble, final_only=True)
        return Generation(answer_of(self._ensemble_events(message, request, final, timeout_s)))

    def ensemble(
        self,
        asked: Asked,
        ensemble: EnsembleSpec,
        *,
        fallback: Fallback | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> EnsembleGeneration:
        """Has several models answer, event by event, each member's attributed; the options are `chat_request`'s."""
        request = chat_request(asked, **options)
        message = pb.GenerateRequest(
            spec=encode_generation(request),
            attempt=1,
            fallback=encode_fallback(fallback) if fallback is not None else None,
        )
        return EnsembleGeneration(self._ensemble_events(message, request, ensemble, timeout_s))

    async def complete(self, asked: Asked, **options: Any) -> Completion:
        """Generates, and returns the whole; the options are those of `generate`."""
        return await self.generate(asked, **options).completion()

    def _ensemble_events(
        self, message: pb.GenerateRequest, request: GenerationRequest, ensemble: EnsembleSpec, timeout_s: float | None
    ) -> AsyncGenerator[EnsembleEvent]:
        message.ensemble.CopyFrom(encode_ensemble(ensemble))
        carrying = EnsembleCarrying(message, request, lambda: self._coordinators.now)
        return self._events(carrying, timeout_s or self._timeout_s)

    async def _events(self, carrying: Carrying, timeout_s: float) -> AsyncGenerator[Any]:
        coordinators = self._coordinators
        self._budget.earn(coordinators.now)
        generating = Generating(
            coordinators, carrying, self._budget, direct=self._direct, given_s=timeout_s, metadata=metadata_now()
        )
        async with aclosing(generating.events()) as events:
            async for event in events:
                yield event

    # --- API keys, for admins ---------------------------------------------------------------------------------------

    @property
    def keys(self) -> MeshKeys:
        """The API keys of those who have no certificate."""
        return MeshKeys(self._coordinators)

    # --- other questions --------------------------------------------------------------------------------------------

    async def embed(self, asked: str | Sequence[str] | EmbeddingRequest, *, model: str = "") -> EmbeddingAnswer:
        """Vectors of a text or several, in order."""
        request = pb.EmbedRequest(spec=encode_embedding(embedding_request(asked, model)))
        answer: pb.EmbedResponse = await self._coordinators.single("Embed", request)
        return EmbeddingAnswer.decode(answer.result)

    async def rerank(
        self, query: str | RerankRequest, documents: Sequence[str] = (), *, model: str = "", top_n: int | None = None
    ) -> RerankAnswer:
        """The documents by how well they answer the query, or the best `top_n` of them."""
        request = pb.RerankRequest(spec=encode_rerank(rerank_request(query, documents, model, top_n)))
        answer: pb.RerankResponse = await self._coordinators.single("Rerank", request)
        return RerankAnswer.decode(answer.result)

    async def count_tokens(self, asked: Asked, *, model: str = "") -> TokenCountAnswer:
        """How many tokens a prompt has, after the model's template."""
        request = pb.CountTokensRequest(spec=encode_generation(chat_request(asked, model=model)))
        answer: pb.CountTokensResponse = await self._coordinators.single("CountTokens", request)
        return TokenCountAnswer.decode(answer.count)

    async def list_models(self) -> MeshModels:
        """The models of the mesh, and where they are."""
        answer: pb.ListModelsResponse = await self._coordinators.single("ListModels", pb.ListModelsRequest())
        return MeshModels.decode(answer)

    async def list_nodes(self, condition: NodeFilter | None = None) -> MeshNodes:
        """Every node with those of its runners that match, and how the registries stand."""
        nodes: list[NodeEntry] = []
        request = pb.ListNodesRequest(
            page_size=MAX_PAGE_SIZE, filter=encode_filter(condition) if condition is not None else None
        )
        while True:
            answer: pb.ListNodesResponse = await self._coordinators.single("ListNodes", request)
            nodes.extend(decode_node_entry(entry) for entry in answer.nodes)
            if not answer.next_page_token:
                registries = tuple(decode_registry(registry) for registry in answer.registries)
                return MeshNodes(tuple(nodes), registries, answer.synced)
            request.page_token = answer.next_page_token

    async def watch_nodes(self, *, without_load: bool = False) -> AsyncGenerator[DirectoryEvent]:
        """The directory as a coordinator sees it: a snapshot, then changes, and a bookmark at least every second.

        It ends with an error when the coordinator goes; watch again then, which starts with a snapshot.
        """
        messages = self._coordinators.stream("WatchNodes", pb.WatchNodesRequest(without_load=without_load))
        try:
            async for message in messages:
                yield decode_directory_event(message.event)
        finally:
            await messages.aclose()

    def watch_events(
        self, condition: EventFilter | None = None, *, since_s: float | None = None
    ) -> AsyncGenerator[EventNews]:
        """What happens in the mesh, seen by every coordinator: from now on, or from `since_s` seconds ago.

        It goes on for ever, over breaks, and says where events are missing. Close it when done (`aclosing`). Clients
        are told of their own requests alone, admins of everybody's.
        """
        return watch_all(self._each, condition if condition is not None else EventFilter(), since_s)

    async def stats(self) -> MeshStats:
        """How requests fared in the last minutes, at every coordinator that answers."""
        return await stats_of(self._each)

    async def cache(self) -> MeshCache:
        """What every coordinator's answer cache holds of this caller, and has done."""
        return await cache_of(self._each)

    async def clear_cache(self, *, everybody: bool = False) -> Mapping[str, int]:
        """Forgets this caller's answers at every coordinator, or everybody's (admins); how many, by coordinator."""
        return await clear_caches(self._each, everybody=everybody)

    async def costs(self, *, by: Grouping = Grouping.DAY, days: int | None = None, latest: int = 0) -> MeshCosts:
        """What this caller's requests cost, for an admin everybody's: of today and `days` before, or of this month. So
        many of the latest ones are told by themselves."""
        return await costs_of(self._each, CostsAsked(by, days, latest))

    async def rate(self, request_id: str, rating: float) -> None:
        """Says how good an answer of an ensemble was, 0 to 1, to the coordinator that gave it, so that it may learn."""
        await rate_answer(self._each, request_id, rating)

    async def learning(self) -> MeshLearning:
        """What every coordinator has learnt of models and strategies."""
        return await learning_of(self._each)

    async def change_learning(self, *, frozen: bool | None = None, reset: bool = False) -> None:
        """Freezes what was learnt everywhere, or learns on, or forgets it; for admins."""
        await change_learning(self._each, frozen=frozen, reset=reset)

    async def explain_placement(self, asked: Asked, *, model: str = "") -> PlacementExplanation:
        """Where a generation would go now, and why not elsewhere. Nothing is run."""
        request = pb.ExplainPlacementRequest(spec=encode_generation(chat_request(asked, model=model)))
        return PlacementExplanation.decode(await self._coordinators.single("ExplainPlacement", request))


def _bearer_of(config: ChorusConfig) -> Bearer:
    """What is shown in place of a certificate. The authority's file of this machine is taken where none is named."""
    mesh, settings = config.mesh, config.client
    assert settings.api_key_file is not None, "who calls this has looked"
    ca = settings.ca
    if ca is None:
        own = (mesh.certs_dir / settings.identity / CA_FILE, mesh.certs_dir / CA_FILE)
        found = next((path for path in own if path.exists()), None)
        if found is None:
            raise ConfigError(
                "client.ca: whoever shows a key must know to whom: name the file of the mesh's authority (ca.crt), or "
                "its SHA-256 fingerprint, which `chorus key create` prints",
                metadata={"keys": "client.ca"},
            )
        ca = str(found)
    return Bearer.known_by(settings.api_key_file, ca, settings.coordinators[0])
