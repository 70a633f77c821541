"""The Coordinator's RPCs: wire in, one call, wire out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from itertools import chain
from typing import Any

from chorus.api.coordinator.v1 import cache_pb2, coordinator_pb2_grpc, costs_pb2, keys_pb2, learning_pb2, stats_pb2
from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.coordinator.answers import encode_explanation, encode_models, encode_nodes
from chorus.coordinator.auditing import Auditing
from chorus.coordinator.caching import AnswerCache
from chorus.coordinator.costs import Costs
from chorus.coordinator.entitlements import Entitlements
from chorus.coordinator.events import EventBoard, reader_of
from chorus.coordinator.granting import Granting
from chorus.coordinator.live import LiveDirectory
from chorus.coordinator.placing import Placing
from chorus.coordinator.registries import Registries
from chorus.coordinator.requests import Requests
from chorus.coordinator.watching import Watching
from chorus.core.ensemble.learning import Learner
from chorus.core.events.stats import Report
from chorus.core.fleet.listing import list_nodes
from chorus.core.placement import Needs, trace_of
from chorus.transport.peer import current_caller
from chorus.wire.costs import decode_costs_request, encode_costs
from chorus.wire.directory import DirectoryEncoder, decode_filter
from chorus.wire.generation import decode_generation
from chorus.wire.keys import decode_limits, decode_scopes, encode_key, encode_usage
from chorus.wire.learning import encode_learning
from chorus.wire.mesh_events import decode_cursor, decode_event_filter, encode_told
from chorus.wire.resources import decode_duration
from chorus.wire.stats import encode_report


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServicer):
    """Every RPC of the Coordinator; errors are ChorusErrors, which the interceptor turns into statuses."""

    def __init__(
        self,
        *,
        live: LiveDirectory,
        placing: Placing,
        requests: Requests,
        answers: AnswerCache,
        granting: Granting,
        registries: Registries,
        watching: Watching,
        events: EventBoard,
        auditing: Auditing,
        learner: Learner,
        costs: Costs,
        entitlements: Entitlements,
        report: Callable[[], Report],
    ) -> None:
        """`report` tells how requests fared lately."""
        self._live = live
        self._placing = placing
        self._requests = requests
        self._answers = answers
        self._granting = granting
        self._registries = registries
        self._watching = watching
        self._events = events
        self._auditing = auditing
        self._learner = learner
        self._costs = costs
        self._entitlements = entitlements
        self._report = report
        self._encoder = DirectoryEncoder()

    # Those that pass a runner's bytes on are of other types than the generated base class thinks.

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # type: ignore[override]
        """Generates. It writes by itself: a runner's messages are passed on as bytes."""
        if request.unused_ticket_id:
            self._granting.returned(request.unused_ticket_id, str(current_caller() or ""))
        async with self._entitlements.generating(request):
            self._auditing.received("generate", request)
            await self._answers.generate(request, context)

    async def Place(self, request: pb.PlaceRequest, context: Any) -> pb.PlaceResponse:
        """Grants a ticket for direct mode."""
        self._auditing.received("place", request)
        return await self._granting.place(request, context)

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> bytes:  # type: ignore[override]
        """Turns texts into vectors."""
        texts = (one.text for one in request.spec.inputs)
        async with self._entitlements.reading(request.spec.model, request.spec.priority, texts):
            self._auditing.received("embed", request)
            return await self._requests.embed(request, context)

    async def Rerank(self, request: pb.RerankRequest, context: Any) -> bytes:  # type: ignore[override]
        """Orders documents."""
        texts = chain((request.spec.query,), request.spec.documents)
        async with self._entitlements.reading(request.spec.model, request.spec.priority, texts):
            self._auditing.received("rerank", request)
            return await self._requests.rerank(request, context)

    async def CountTokens(self, request: pb.CountTokensRequest, context: Any) -> bytes:  # type: ignore[override]
        """Counts a prompt's tokens."""
        async with self._entitlements.reading(request.spec.model, request.spec.priority, ()):
            return await self._requests.count_tokens(request, context)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """Lists the mesh's models."""
        return encode_models(self._live.directory, self._placing.default_model())

    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:
        """Lists nodes, a page at a time."""
        directory = self._live.directory
        page = list_nodes(
            directory.leased(self._live.now),
            condition=decode_filter(request.filter) if request.HasField("filter") else None,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return encode_nodes(page, directory, epoch=self._watching.epoch, registries=self._registries.health())

    async def WatchNodes(  # type: ignore[override]
        self, request: pb.WatchNodesRequest, context: Any
    ) -> AsyncIterator[bytes]:
        """Streams the directory."""
        async for event in self._watching.events(without_load=request.without_load):
            yield self._encoder.response(event)

    async def WatchEvents(self, request: pb.WatchEventsRequest, context: Any) -> AsyncIterator[pb.WatchEventsResponse]:
        """Streams what happens."""
        condition = decode_event_filter(request.filter, reader=reader_of(current_caller()))
        after = decode_cursor(request.after) if request.HasField("after") else None
        since_s = decode_duration(request.since) if request.HasField("since") else None
        async for told in self._events.watch(condition, after=after, since_s=since_s):
            yield pb.WatchEventsResponse(events=encode_told(told))

    async def GetStats(self, request: stats_pb2.GetStatsRequest, context: Any) -> stats_pb2.GetStatsResponse:
        """Tells how requests fared."""
        return encode_report(self._report())

    async def GetCache(self, request: cache_pb2.GetCacheRequest, context: Any) -> cache_pb2.GetCacheResponse:
        """Tells what the cache holds."""
        return await self._answers.summary()

    async def ClearCache(self, request: cache_pb2.ClearCacheRequest, context: Any) -> cache_pb2.ClearCacheResponse:
        """Forgets answers."""
        forgotten = await self._answers.clear(everybody=request.everybody)
        self._auditing.cache_cleared(everybody=request.everybody, forgotten=forgotten)
        return cache_pb2.ClearCacheResponse(forgotten_count=forgotten, shared_store=self._answers.is_shared)

    async def GetCosts(self, request: costs_pb2.GetCostsRequest, context: Any) -> costs_pb2.GetCostsResponse:
        """Tells what requests cost."""
        return encode_costs(await self._costs.report(decode_costs_request(request)))

    async def RateResponse(
        self, request: learning_pb2.RateResponseRequest, context: Any
    ) -> learning_pb2.RateResponseResponse:
        """Learns how good an answer was."""
        self._learner.rate(str(current_caller() or ""), request.request_id, request.rating)
        return learning_pb2.RateResponseResponse()

    async def GetLearning(
        self, request: learning_pb2.GetLearningRequest, context: Any
    ) -> learning_pb2.GetLearningResponse:
        """Tells what was learnt."""
        return encode_learning(self._learner)

    async def ChangeLearning(
        self, request: learning_pb2.ChangeLearningRequest, context: Any
    ) -> learning_pb2.ChangeLearningResponse:
        """Freezes or forgets what was learnt."""
        self._learner.change(frozen=request.frozen if request.HasField("frozen") else None, reset=request.reset)
        return learning_pb2.ChangeLearningResponse()

    async def CreateKey(self, request: keys_pb2.CreateKeyRequest, context: Any) -> keys_pb2.CreateKeyResponse:
        """Makes an API key."""
        callers = self._entitlements.callers
        key, text = await callers.create(
            request.name,
            ttl_s=decode_duration(request.ttl) if request.HasField("ttl") else None,
            client=request.client,
            scopes=decode_scopes(request.scopes),
            limits=decode_limits(request.limits),
            by=str(current_caller() or ""),
        )
        return keys_pb2.CreateKeyResponse(key=encode_key(key, callers.now), text=str(text))

    async def ListKeys(self, request: keys_pb2.ListKeysRequest, context: Any) -> keys_pb2.ListKeysResponse:
        """Lists API keys."""
        callers = self._entitlements.callers
        return keys_pb2.ListKeysResponse(keys=[encode_key(key, callers.now) for key in await callers.keys()])

    async def RevokeKey(self, request: keys_pb2.RevokeKeyRequest, context: Any) -> keys_pb2.RevokeKeyResponse:
        """Takes an API key back."""
        await self._entitlements.callers.revoke(request.key_id, by=str(current_caller() or ""))
        return keys_pb2.RevokeKeyResponse()

    async def GetKeyUsage(self, request: keys_pb2.GetKeyUsageRequest, context: Any) -> keys_pb2.GetKeyUsageResponse:
        """Tells what was used with an API key."""
        return encode_usage(await self._entitlements.callers.usage(request.key_id))

    async def ExplainPlacement(self, request: pb.ExplainPlacementRequest, context: Any) -> pb.ExplainPlacementResponse:
        """Explains where a generation would go."""
        generation = decode_generation(request.spec)
        needs = self._placing.resolved(Needs.of_generation(generation))
        trace = trace_of(generation, needs.likely_prompt_tokens)
        return encode_explanation(needs, self._placing.explain(needs, trace))
