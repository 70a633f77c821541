"""The ModelRunner service: messages in, one call of the engine, messages out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from chorus.api.runner.v1 import runner_pb2 as pb
from chorus.api.runner.v1 import runner_pb2_grpc
from chorus.core.audit import DeedKind
from chorus.core.errors import PermissionDeniedError
from chorus.core.fleet.records import ModelStatus
from chorus.core.generation import Finished
from chorus.engine.base import Engine
from chorus.runner.auditing import Auditing
from chorus.runner.generating import Account
from chorus.runner.loading import load_and_tell
from chorus.runner.orca import LoadReporter, generation_cost
from chorus.runner.presence import Presence
from chorus.runner.tickets import TicketDesk
from chorus.runner.work import Work
from chorus.telemetry import context as request_context
from chorus.telemetry.metrics import GenerationMetrics
from chorus.transport.peer import current_caller
from chorus.wire.embedding import decode_embedding, encode_embedding_result, encode_token_count
from chorus.wire.events import Origin, encode_event, encode_progress
from chorus.wire.generation import decode_generation
from chorus.wire.rerank import decode_rerank, encode_ranking
from chorus.wire.resources import RUNNER_STATES, encode_load, encode_model_status, encode_node, encode_runner
from chorus.wire.tickets import encode_use


class RunnerServicer(runner_pb2_grpc.ModelRunnerServicer):
    """What a runner answers. Every error that the engine raises is the caller's to see."""

    def __init__(
        self,
        engine: Engine,
        presence: Presence,
        work: Work,
        metrics: GenerationMetrics,
        reporter: LoadReporter,
        desk: TicketDesk,
        auditing: Auditing,
        *,
        allow_load: bool,
    ) -> None:
        self._engine = engine
        self._presence = presence
        self._work = work
        self._metrics = metrics
        self._reporter = reporter
        self._desk = desk
        self._auditing = auditing
        self._allow_load = allow_load

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        """Generates. A caller that goes away closes the generator, and that the engine's, which frees the slot."""
        admitted = self._desk.admitted(request, current_caller())
        with self._work.begun(), self._reporter.request(context) as cost, admitted as usage:
            generation = decode_generation(request.spec)
            origin = self._origin(request.attempt)
            # leaving it closes the engine's generator at once, which frees the slot
            async with aclosing(self._engine.generate(generation)) as events:
                with Account(self._metrics, time.monotonic) as account:
                    usage.account = account
                    async for event in events:
                        account.note(event)
                        if isinstance(event, Finished):
                            cost.update(generation_cost(event))
                        response = pb.GenerateResponse()
                        encode_event(event, origin, response.event)
                        yield response

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        """Turns texts into vectors."""
        with self._begun(), self._reporter.request(context) as cost:
            artifact, embeddings = await self._engine.embed(decode_embedding(request.spec))
            cost["prompt_tokens"] = sum(embedding.token_count for embedding in embeddings)
        presence = self._presence
        result = encode_embedding_result(artifact, embeddings, node_id=presence.node_id, runner_id=presence.runner_id)
        return pb.EmbedResponse(result=result)

    async def Rerank(self, request: pb.RerankRequest, context: Any) -> pb.RerankResponse:
        """Orders documents."""
        with self._begun(), self._reporter.request(context) as cost:
            artifact, ranking = await self._engine.rerank(decode_rerank(request.spec))
            cost["prompt_tokens"] = ranking.token_count
        presence = self._presence
        result = encode_ranking(artifact, ranking, node_id=presence.node_id, runner_id=presence.runner_id)
        return pb.RerankResponse(result=result)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Turns text into token ids."""
        with self._work.begun():
            artifact, token_ids = await self._engine.tokenize(
                request.model, request.text, add_special=request.add_special, parse_special=request.parse_special
            )
        return pb.TokenizeResponse(token_ids=token_ids, artifact_sha256=artifact.sha256)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """Turns token ids into text."""
        with self._work.begun():
            text = await self._engine.detokenize(
                request.model, list(request.token_ids), show_special=request.show_special
            )
        return pb.DetokenizeResponse(text=text)

    async def CountTokens(self, request: pb.CountTokensRequest, context: Any) -> pb.CountTokensResponse:
        """Counts a prompt's tokens."""
        with self._begun():
            generation = decode_generation(request.spec)
            status, count = await self._engine.count_tokens(generation.model, generation.prompt, generation.tools)
        return pb.CountTokensResponse(count=encode_token_count(status, count))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """Lists the models."""
        return pb.ListModelsResponse(models=[encode_model_status(model) for model in self._engine.models()])

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> AsyncIterator[pb.LoadModelResponse]:
        """Loads a model. A shutdown doesn't wait for it."""
        self._check_loading()
        self._work.admit()
        self._auditing.asked(DeedKind.LOAD_ASKED, request.model)
        context_length = request.context_length if request.HasField("context_length") else None
        async with aclosing(load_and_tell(self._engine, request.model, context_length)) as told:
            async for event in told:
                if isinstance(event, ModelStatus):
                    yield pb.LoadModelResponse(loaded=encode_model_status(event))
                else:
                    yield pb.LoadModelResponse(progress=encode_progress(event))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        """Unloads a model."""
        self._check_loading()
        self._work.admit()
        self._auditing.asked(DeedKind.UNLOAD_ASKED, request.model)
        return pb.UnloadModelResponse(
            model=encode_model_status(await self._engine.unload(request.model, wait=request.wait))
        )

    async def WatchTickets(
        self, request: pb.WatchTicketsRequest, context: Any
    ) -> AsyncIterator[pb.WatchTicketsResponse]:
        """Tells a coordinator what becomes of its tickets."""
        async with aclosing(self._desk.watch(current_caller())) as told:
            async for uses in told:
                yield pb.WatchTicketsResponse(uses=[encode_use(use) for use in uses])

    async def GetNode(self, request: pb.GetNodeRequest, context: Any) -> pb.GetNodeResponse:
        """Tells what this runner is."""
        presence = self._presence
        return pb.GetNodeResponse(
            node=encode_node(presence.node()),
            runner=encode_runner(presence.runner()),
            state=RUNNER_STATES[presence.state],
            load=encode_load(presence.load()),
        )

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """A request that its caller sent on its own account."""
        with self._work.begun(), self._presence.serving(current_caller()):
            yield

    def _origin(self, attempt: int) -> Origin:
        call, presence = request_context.current(), self._presence
        return Origin(
            request_id="" if call is None else call.request_id,
            node_id=presence.node_id,
            runner_id=presence.runner_id,
            incarnation=presence.incarnation,
            attempt=attempt or 1,
        )

    def _check_loading(self) -> None:
        if not self._allow_load:
            raise PermissionDeniedError(
                "the owner of this runner allows nobody to load or unload models over the network (runner.allow_load)"
            )
