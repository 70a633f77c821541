"""Requests on their way through a coordinator: admitted, placed, tried on runners, answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.api.inference.v1 import generation_pb2
from chorus.api.runner.v1 import runner_pb2
from chorus.coordinator.admission import Admission, Asking
from chorus.coordinator.attempt_errors import broken_off, of_runner
from chorus.coordinator.carrying import Carrying
from chorus.coordinator.channels import ChannelPool, RunnerChannel
from chorus.coordinator.costs import Costs
from chorus.coordinator.events import EventBoard, GenerationReport, RequestReport
from chorus.coordinator.hedging import Called, Hedging, Race
from chorus.coordinator.live import LiveDirectory
from chorus.coordinator.placing import Placing, Running
from chorus.coordinator.relay import relay
from chorus.coordinator.spending import current_spending, spent
from chorus.core.costs import Bill, Tab
from chorus.core.errors import (
    ChorusError,
    DeadlineExceededError,
    InternalError,
    UnavailableError,
)
from chorus.core.generation import Priority
from chorus.core.placement import Candidate, FallingBack, Needs, Work, trace_of
from chorus.core.resilience.delivered import Delivered
from chorus.core.resilience.resuming import Resuming
from chorus.core.resilience.stream_silence import PATIENCE, StreamPatience, patience_with
from chorus.telemetry.context import outgoing_metadata
from chorus.telemetry.logs import get_logger
from chorus.telemetry.metrics import GenerationMetrics, StreamTimer
from chorus.transport.guarding import StreamGuard, is_being_cancelled
from chorus.transport.peer import current_caller
from chorus.wire.embedding import decode_embedding
from chorus.wire.fallback import decode_fallback
from chorus.wire.generation import decode_generation
from chorus.wire.rerank import decode_rerank
from chorus.wire.resources import encode_duration

T = TypeVar("T")
Context = Any  # grpc.aio.ServicerContext; its stubs know nothing of messages that are raw bytes

# A runner gets so much less time than the caller left, so that its own word of why it was late still arrives.
_DEADLINE_MARGIN_S = 0.05
# After Finished only the end of the runner's stream is missing; it is awaited so that the runner does not see a
# cancelled call, but not for long.
_END_TIMEOUT_S = 1.0
_LOGGED_NAME = 100
# Those that tell what they used.
_ANSWERS: Mapping[type, Any] = {
    runner_pb2.EmbedRequest: runner_pb2.EmbedResponse,
    runner_pb2.RerankRequest: runner_pb2.RerankResponse,
}

_log = get_logger()


class Sink(Protocol):
    """Where a generation's stream goes: a call's context, or whoever stands before one."""

    async def write(self, message: bytes) -> None:
        """Takes a message of the stream."""
        ...

    def time_remaining(self) -> float | None:
        """Seconds; None without a deadline."""
        ...


class Requests:
    """Generations, embeddings, rankings and token counts. One object serves all callers."""

    def __init__(
        self,
        live: LiveDirectory,
        placing: Placing,
        pool: ChannelPool,
        *,
        admission: Admission,
        hedging: Hedging,
        costs: Costs,
        events: EventBoard,
        connect_timeout_s: float,
        silence_wait_s: float,
        metrics: GenerationMetrics,
    ) -> None:
        self._live = live
        self._placing = placing
        self._pool = pool
        self._admission = admission
        self._hedging = hedging
        self._costs = costs
        self._events = events
        self._connect_timeout_s = connect_timeout_s
        self._silence_wait_s = silence_wait_s
        self._metrics = metrics

    async def generate(
        self,
        request: coordinator_pb2.GenerateRequest,
        context: Sink,
        report: GenerationReport | None = None,
        *,
        member_id: str = "",
        is_named: bool = True,
        admitted_within_s: float | None = None,
    ) -> None:
        """Generates with one model, writing the stream to `context`.

        `report` is told of what happens to it; None: it is a request of its own. `member_id` is for the log.
        `is_named`: its model is the caller's choice, by which a paid provider of it is allowed. `admitted_within_s`:
        how long whoever asks waits for a place, where that is less than the call's time.
        """
        began = self._live.now
        delivered = Delivered()
        told: dict[str, Any] = {"model": request.spec.model[:_LOGGED_NAME]}
        if member_id:
            told["member_id"] = member_id
        timers: list[StreamTimer] = []
        report = report or self._events.request(Work.GENERATE, request.spec.model)
        try:
            generation = decode_generation(request.spec)
            await self.knows_the_mesh(context)
            falling_back = FallingBack(decode_fallback(request.fallback), generation)
            needs = self._placing.resolved(Needs.of_generation(generation, allow_external=request.fallback.external))
            if not is_named:
                needs = replace(needs, allow_external=request.fallback.external)
            carrying = Carrying(
                request.spec,
                generation,
                needs=self._placing.fall_back(needs, falling_back),
                falling_back=falling_back,
                first_attempt=request.attempt,
                arrived=began,
                clock=self._live.clock,
                time_left=lambda: _time_left(context),
                events=self._events,
                tab=report.tab,
            )
            delivered, resuming = carrying.delivered, self._placing.resuming()

            trace = trace_of(generation, needs.likely_prompt_tokens)
            patience = patience_with(generation.priority)
            hedged = self._hedging.may_be(generation, allowed=request.allow_hedging)

            def asks(running: Running) -> runner_pb2.GenerateRequest:
                candidate = running.candidate
                told.update(
                    model=candidate.model.artifact.family,
                    artifact=candidate.model.artifact.name,
                    runner_id=candidate.runner_id,
                    node_id=candidate.node_id,
                    attempts=running.number,
                )
                report.asked(candidate, running.number)
                if not timers:
                    timers.append(StreamTimer(self._metrics.model(candidate.model.artifact.family), began))
                return carrying.attempt(candidate, running.number)

            def called(running: Running, message: runner_pb2.GenerateRequest) -> Called:
                return self._called(running.candidate, carrying, report.tab, resuming, message, context, patience)

            async def run(running: Running) -> None:
                message = asks(running)
                needs = carrying.needs
                race = (
                    Race(self._hedging, running, called, asks, needs, trace) if hedged and not carrying.begun else None
                )
                timed = self._hedging.timed(running, carrying.delivered, needs)
                calling = called(running, message) if race is None else race.run(message, context.write)
                async with timed, calling as (messages, guard):
                    relaying = relay(
                        messages,
                        context.write,
                        delivered,
                        carrying,
                        runner_id=running.candidate.runner_id,
                        timer=timers[0],
                        clock=self._live.clock,
                        watch=guard.watch,
                    )
                    # A task of its own: in this one each message would wake all who wait here for those below them.
                    await asyncio.create_task(relaying)
                    await _await_end(messages)

            asking = Asking(
                caller=_caller(),
                priority=generation.priority,
                lane=carrying.needs.model,
                most_tokens=needs.answer_tokens,
                time_left_s=context.time_remaining() if admitted_within_s is None else admitted_within_s,
            )
            async with self._admission.admitted(asking, lambda *place: context.write(_queued(*place))) as place:
                report.admitted(generation.priority)
                await self._placing.attempt(
                    carrying.needs,
                    run,
                    trace=trace,
                    carried=carrying,
                    resuming=resuming,
                    avoided=request.failed_runner_id,
                )
                place.tokens = delivered.output_tokens
        except (asyncio.CancelledError, grpc.aio.InternalError):  # the latter: nobody reads what is written
            self._log_end("request.finished" if delivered.finished else "request.cancelled", began, delivered, told)
            report.cancelled(delivered)
            raise
        except Exception as error:
            reason = error.reason if isinstance(error, ChorusError) else InternalError.reason
            self._log_end("request.failed", began, delivered, told, reason=reason, why=str(error))
            report.failed(error, delivered)
            raise
        else:
            self._log_end("request.finished", began, delivered, told, ttft_s=timers[0].time_to_first_token)
            report.completed(delivered)
        finally:
            spent(delivered.prompt_tokens, delivered.output_tokens)
            for timer in timers:
                timer.close(prompt_tokens=delivered.prompt_tokens)

    async def embed(
        self, request: coordinator_pb2.EmbedRequest, context: Context, *, allow_external: bool | None = None
    ) -> bytes:
        """The bytes of an EmbedResponse. `allow_external` None: a paid provider may be asked if its model is named."""

        def asks() -> tuple[Needs, Priority]:
            asked = decode_embedding(request.spec)
            needs = Needs.of_embedding(asked)
            return needs if allow_external is None else replace(needs, allow_external=allow_external), asked.priority

        message = runner_pb2.EmbedRequest(spec=request.spec)
        return await self._answered(Work.EMBED, asks, message, lambda channel: channel.embed, context)

    async def rerank(self, request: coordinator_pb2.RerankRequest, context: Context) -> bytes:
        """The bytes of a RerankResponse."""

        def asks() -> tuple[Needs, Priority]:
            asked = decode_rerank(request.spec)
            return Needs.of_rerank(asked), asked.priority

        message = runner_pb2.RerankRequest(spec=request.spec)
        return await self._answered(Work.RERANK, asks, message, lambda channel: channel.rerank, context)

    async def count_tokens(self, request: coordinator_pb2.CountTokensRequest, context: Context) -> bytes:
        """The bytes of a CountTokensResponse."""

        def asks() -> tuple[Needs, Priority]:
            return Needs.of_token_count(decode_generation(request.spec)), Priority.INTERACTIVE

        message = runner_pb2.CountTokensRequest(spec=request.spec)
        return await self._answered(Work.COUNT_TOKENS, asks, message, lambda channel: channel.count_tokens, context)

    async def _answered(
        self,
        work: Work,
        asks: Callable[[], tuple[Needs, Priority]],
        message: Any,
        method: Callable[[RunnerChannel], Any],
        context: Context,
    ) -> bytes:
        """A single answer. `asks` decodes what is asked for; `message` is what a runner gets, but for the model."""
        report = self._events.request(work, message.spec.model)
        with _told(report):
            needs, priority = asks()
            await self.knows_the_mesh(context)
            needs = self._placing.resolved(needs)

            async def run(running: Running) -> bytes:
                report.asked(running.candidate, running.number)
                message.spec.model = running.candidate.model.artifact.name
                return await self._single(running.candidate, needs, report.tab, method, message, context)

            async with self._admission.admitted(_short(work, priority, context)):
                report.admitted(priority)
                answer = await self._placing.attempt(needs, run)
        if current_spending() is not None and type(message) in _ANSWERS:
            spent(_ANSWERS[type(message)].FromString(answer).result.usage.prompt_token_count, 0)
        return answer

    async def knows_the_mesh(self, context: Sink) -> None:
        """Waits, for a while, where it is not known yet who is there."""
        await self._live.wait_told(self._connect_timeout_s, _time_left(context))

    # --- one attempt ------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _called(
        self,
        candidate: Candidate,
        carrying: Carrying,
        tab: Tab,
        resuming: Resuming,
        message: runner_pb2.GenerateRequest,
        context: Sink,
        patience: StreamPatience,
    ) -> AsyncIterator[tuple[AsyncIterator[bytes], StreamGuard]]:
        """A call to a runner and who looks after it; however the block is left, the call ends. Raises ChorusErrors.

        Where a paid provider is asked, it is put on `tab`.
        """
        delivered = carrying.delivered
        billed = self._costs.billed(
            candidate,
            carrying.needs,
            tab,
            time_left_s=context.time_remaining(),
            delivered=lambda: delivered.output_tokens,
        )

        def goes_elsewhere(_alive: bool) -> bool:
            """Whether the stream may be left now. The last one that may be tried is not: it may yet come back."""
            if delivered.started and (delivered.obstacle or not resuming.may_break(carrying.tokens)):
                return False
            return self._placing.has_place(carrying.needs_elsewhere(), without={candidate.runner_id})

        with self._channel(candidate) as channel:
            await self._connected(channel, context)
            async with billed:
                call = channel.generate(message, timeout=_time_left(context), metadata=outgoing_metadata())
                guard = self._guard(channel, call, goes_elsewhere, patience)
                leave = partial(self._go_elsewhere, call, carrying.needs, delivered)
                with _ended(call, guard, candidate), channel.told_when_retired(leave):
                    yield aiter(call), guard

    async def _single(
        self,
        candidate: Candidate,
        needs: Needs,
        tab: Tab,
        method: Callable[[RunnerChannel], Any],
        message: Any,
        context: Context,
    ) -> bytes:
        with self._channel(candidate) as channel:
            await self._connected(channel, context)
            async with self._costs.billed(candidate, needs, tab, time_left_s=context.time_remaining()) as bill:
                call = method(channel)(message, timeout=_time_left(context), metadata=outgoing_metadata())
                guard = self._guard(
                    channel, call, lambda _alive: self._placing.has_place(needs, without={candidate.runner_id})
                )
                with (
                    _ended(call, guard, candidate),
                    channel.told_when_retired(partial(self._go_elsewhere, call, needs)),
                ):
                    answer: bytes = await call
                return answer if bill is None else _priced(message, answer, bill, tab)

    def _go_elsewhere(self, call: Any, needs: Needs, delivered: Delivered | None = None) -> None:
        """The runner has left the mesh: if it had said nothing yet and somebody else would serve, it is not waited for.

        Its connection may still be open, as that of a process that stands still is.
        """
        if not (delivered is not None and delivered.started) and self._placing.has_place(needs):
            call.cancel()

    def _guard(
        self,
        channel: RunnerChannel,
        call: Any,
        goes_elsewhere: Callable[[bool], bool],
        patience: StreamPatience = PATIENCE,
    ) -> StreamGuard:
        return StreamGuard(
            channel,
            call,
            patience=patience,
            wait_s=self._silence_wait_s,
            goes_elsewhere=goes_elsewhere,
            clock=self._live.clock,
        )

    @contextmanager
    def _channel(self, candidate: Candidate) -> Iterator[RunnerChannel]:
        channel = self._pool.get(candidate.runner_id)
        if channel is None:
            raise UnavailableError(f"there is no connection to the runner {candidate.runner_id}")
        with channel.used():
            yield channel

    async def _connected(self, channel: RunnerChannel, context: Sink) -> None:
        left_s = _time_left(context)
        await channel.connected(self._connect_timeout_s if left_s is None else min(left_s, self._connect_timeout_s))

    def _log_end(
        self, event: str, began: float, delivered: Delivered, told: dict[str, Any], **more: str | float | None
    ) -> None:
        _log.info(
            event,
            **told,
            seconds=round(self._live.now - began, 6),
            prompt_tokens=delivered.prompt_tokens,
            output_tokens=delivered.output_tokens,
            **more,
        )


@contextmanager
def _ended(call: Any, guard: StreamGuard, candidate: Candidate) -> Iterator[None]:
    """Looks after a call to a runner, and ends it however the block is left. Raises ChorusErrors in place of gRPC's."""
    try:
        with guard:
            yield
    except grpc.RpcError as error:
        raise guard.left or of_runner(error, candidate) from error
    except asyncio.CancelledError:
        if is_being_cancelled():
            raise
        raise guard.left or broken_off(candidate) from None
    finally:
        # Whatever ended this attempt: an abandoned call would go on decoding for nobody.
        call.cancel()


def _priced(asked: Any, answer: bytes, bill: Bill, tab: Tab) -> bytes:
    """A paid provider's single answer, with what it costs."""
    kind = _ANSWERS.get(type(asked))
    if kind is None:
        return answer
    message = kind.FromString(answer)
    usage = message.result.usage
    bill.told(usage.prompt_token_count, usage.completion_token_count)
    usage.cost_micro_usd = tab.cost
    return bytes(message.SerializeToString())


@contextmanager
def _told(report: RequestReport) -> Iterator[None]:
    """Tells how a request with a single answer ends, when the block is left."""
    try:
        yield
    except (asyncio.CancelledError, grpc.aio.InternalError):
        report.cancelled()
        raise
    except Exception as error:
        report.failed(error)
        raise
    else:
        report.completed()


def _caller() -> str:
    """Between whom admission is fair; all who come over plaintext, on loopback, are one."""
    return str(current_caller() or "")


def _short(work: Work, priority: Priority, context: Context) -> Asking:
    """Work that takes no slot: only the coordinator's own bound counts."""
    return Asking(_caller(), priority, lane=f":{work}", time_left_s=context.time_remaining())


def _queued(position: int, wait_s: float) -> bytes:
    """The message that tells a caller of its place in the queue."""
    queued = generation_pb2.Queued(position=position, estimated_wait=encode_duration(wait_s) if wait_s else None)
    message = coordinator_pb2.GenerateResponse(event=generation_pb2.GenerationEvent(queued=queued))
    return message.SerializeToString()


def _named(enum: Any, value: int) -> str:
    """The name of an enum's value; of one that this version does not know, its number."""
    return str(enum.Name(value)) if value in enum.values() else str(value)


def _time_left(context: Sink) -> float | None:
    """Seconds that a runner gets; None where the caller set no deadline. Raises DeadlineExceededError after it."""
    left = context.time_remaining()
    if left is None:
        return None
    left -= min(_DEADLINE_MARGIN_S, left / 10)
    if left <= 0:
        raise DeadlineExceededError("the request's deadline has passed")
    return left


async def _await_end(messages: AsyncIterator[bytes]) -> None:
    """Reads to the end of a stream whose answer is complete; how it ends matters no more.

    Also where the call is cancelled for its runner's sake: taken for a break, the whole answer would be gone on with.
    """
    try:
        async with asyncio.timeout(_END_TIMEOUT_S):
            async for _ in messages:
                pass
    except (grpc.RpcError, TimeoutError):
        return
    except asyncio.CancelledError:
        if is_being_cancelled():
            raise
