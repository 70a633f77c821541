"""Direct mode: tickets for clients that ask runners themselves, and the books of what becomes of them.

The runner tells of the end over a stream that this coordinator opens to it, so that nobody has to dial coordinators.
It is open before the first ticket is granted: a runner that can't tell (an older one) gets no clients.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.api.runner.v1 import runner_pb2
from chorus.coordinator.admission import Admission, Asking, Place
from chorus.coordinator.channels import ChannelPool
from chorus.coordinator.entitlements import Entitlements
from chorus.coordinator.events import EventBoard, RequestReport
from chorus.coordinator.live import LiveDirectory
from chorus.coordinator.placing import Placing, Running
from chorus.coordinator.spending import Spending
from chorus.core.admission.grants import HOLD_S, Closed, Closing, Grants, RunnerLife
from chorus.core.errors import ChorusError, UnavailableError, UnsupportedFeatureError
from chorus.core.fleet.directory import DirectoryChange
from chorus.core.identity.tickets import LEEWAY_S, Ticket, TicketUse
from chorus.core.placement import FallingBack, Needs, Work, is_external, trace_of
from chorus.telemetry.logs import get_logger
from chorus.telemetry.metrics import GenerationMetrics
from chorus.transport import TlsIdentity
from chorus.transport.peer import current_caller
from chorus.transport.tickets import TicketSigner
from chorus.wire.errors import error_of_reason, from_rpc_error
from chorus.wire.fallback import decode_fallback, encode_substitution
from chorus.wire.generation import decode_generation
from chorus.wire.resources import encode_duration
from chorus.wire.tickets import decode_use, spec_sha256

# What a runner's word may take to come, after the last moment at which it takes a ticket.
_LAG_S = 2.0
_SWEEP_S = 0.5
_WATCH_TIMEOUT_S = 2.0
_WATCH_PAUSE_S = 0.25
# A runner of an older version doesn't have the RPC, and won't have it until it is started anew.
_NO_SUCH_RPC_PAUSE_S = 60.0

_log = get_logger()


@dataclass(slots=True)
class _Held:
    """What a ticket holds while it is open: a place at the door until it is overdue, and one at its runner.

    `counted`: the latter; it is taken anew for who comes late.
    """

    ticket_id: str
    place: Place | None
    reserved: Running
    report: RequestReport
    spending: Spending | None
    counted: bool = True


class Granting:
    """Grants tickets and keeps their places. Used from one event loop; `wall` is seconds since 1970."""

    def __init__(
        self,
        live: LiveDirectory,
        placing: Placing,
        pool: ChannelPool,
        admission: Admission,
        metrics: GenerationMetrics,
        *,
        events: EventBoard,
        entitlements: Entitlements,
        identity: TlsIdentity | None,
        ttl_s: float,
        told_within_s: float,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._live = live
        self._placing = placing
        self._pool = pool
        self._admission = admission
        self._metrics = metrics
        self._events = events
        self._entitlements = entitlements
        self._signer = TicketSigner(identity) if identity is not None else None
        self._ttl_s = ttl_s
        self._told_within_s = told_within_s
        self._wall = wall
        self._grants: Grants[_Held] = Grants(hold_s=HOLD_S)
        self._watches: dict[RunnerLife, _Watch] = {}
        self._timer: asyncio.TimerHandle | None = None
        live.on_change(self._follow)

    @property
    def open(self) -> int:
        """Tickets whose places are kept."""
        return len(self._grants)

    async def place(self, request: pb.PlaceRequest, context: Any) -> pb.PlaceResponse:
        """Admits and places a generation, and grants a ticket for it."""
        caller = current_caller()
        if self._signer is None or caller is None:
            raise UnsupportedFeatureError(
                "this mesh has no certificates, by which runners would know whose ticket they are shown; use Generate",
                metadata={"feature": "direct"},
            )
        spending = await self._entitlements.placing(request)
        report = self._events.request(Work.GENERATE, request.spec.model)
        try:
            return await self._place(request, context, str(caller), report, spending)
        except asyncio.CancelledError:
            report.cancelled()
            self._entitlements.ticket_ended(spending, begun=False)
            raise
        except Exception as error:
            report.failed(error)
            self._entitlements.ticket_ended(spending, begun=False)
            raise

    async def _place(
        self,
        request: pb.PlaceRequest,
        context: Any,
        caller: str,
        report: RequestReport,
        spending: Spending | None,
    ) -> pb.PlaceResponse:
        generation = decode_generation(request.spec)
        falling_back = FallingBack(decode_fallback(request.fallback), generation)
        await self._live.wait_told(self._told_within_s, context.time_remaining())
        needs = self._placing.resolved(Needs.of_generation(generation, allow_external=request.fallback.external))
        needs = self._placing.fall_back(needs, falling_back)
        asking = Asking(
            caller=caller,
            priority=generation.priority,
            lane=needs.model,
            most_tokens=needs.answer_tokens,
            time_left_s=context.time_remaining(),
        )
        place = await self._admission.enter(asking, wait=request.wait)
        report.admitted(generation.priority)
        try:
            reserved = self._placing.reserve(needs, trace_of(generation, needs.likely_prompt_tokens))
        except ChorusError:
            self._admission.leave(place, well=False)
            raise
        held = _Held(uuid.uuid4().hex, place, reserved, report, spending)
        try:
            if is_external(reserved.candidate.entry.record, reserved.candidate.model):
                raise UnsupportedFeatureError(
                    "a paid provider would answer, which is asked through the coordinator alone, so that its costs are "
                    "counted; use Generate",
                    metadata={"feature": "direct"},
                )
            report.asked(reserved.candidate, 1)
            await self._heard_from(reserved)
            response = self._grant(held, caller, request, needs.answer_tokens)
        except BaseException:  # the caller may have gone away meanwhile
            self._let_go(held)
            raise
        if falling_back.substitution is not None:
            response.substitution.CopyFrom(encode_substitution(falling_back.substitution))
        return response

    def returned(self, ticket_id: str, caller: str) -> None:
        """A caller says that it won't use a ticket."""
        self._settle(self._grants.returned(ticket_id, caller))

    async def close(self) -> None:
        """Ends every watch."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [watch.task for watch in self._watches.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- granting ---------------------------------------------------------------------------------------------------

    def _grant(self, held: _Held, caller: str, request: pb.PlaceRequest, tokens: int) -> pb.PlaceResponse:
        assert self._signer is not None, "place() has looked"
        runner, candidate = held.reserved.candidate.entry.record.runner, held.reserved.candidate
        ticket = Ticket(
            ticket_id=held.ticket_id,
            caller=caller,
            runner_id=runner.runner_id,
            incarnation=runner.incarnation,
            spec_sha256=spec_sha256(request.spec),
            artifact=candidate.model.artifact.name,
            reserved_tokens=tokens,
            expires_at=self._wall() + self._ttl_s,
        )
        response = pb.PlaceResponse(
            ticket=self._signer.sign(ticket),
            ticket_id=ticket.ticket_id,
            expires_in=encode_duration(self._ttl_s),
            address=runner.address,
            server_name=runner.server_name,
            runner_id=runner.runner_id,
            node_id=runner.node_id,
            incarnation=runner.incarnation,
            artifact=ticket.artifact,
        )
        now, life = self._live.now, (runner.runner_id, runner.incarnation)
        lapses_at = now + self._ttl_s + LEEWAY_S + _LAG_S
        self._grants.grant(ticket.ticket_id, caller, life, held, now=now, lapses_at=lapses_at)
        if self._timer is None:
            self._sweep_later()
        _log.info("ticket.granted", ticket_id=ticket.ticket_id, runner_id=runner.runner_id, model=ticket.artifact)
        return response

    def _let_go(self, held: _Held) -> None:
        if held.counted:
            held.counted = False
            self._placing.settle(held.reserved, None, tried=False)
        self._leave(held)

    def _leave(self, held: _Held, *, tokens: int = 0, well: bool = False) -> None:
        place, held.place = held.place, None
        if place is not None:
            place.tokens = tokens
            self._admission.leave(place, well=well)

    def _come_late(self, held: _Held) -> None:
        """Its place at the door may be another's by now; it is counted where it runs."""
        held.reserved = self._placing.again(held.reserved)
        held.counted = True
        _log.info("ticket.late", ticket_id=held.ticket_id, runner_id=held.reserved.candidate.runner_id)

    # --- the books --------------------------------------------------------------------------------------------------

    def _settle(self, closed: Iterable[Closed[_Held]]) -> None:
        for one in closed:
            held, use = one.held, one.use
            self._metrics.ticket(one.closing)
            if one.closing is Closing.ENDED and use is not None:
                self._note(held, use)
            elif one.closing is Closing.LOST:
                runner_id = held.reserved.candidate.runner_id
                error = UnavailableError(f"the runner {runner_id} went while it served a ticket")
                self._end(held, error)
                self._leave(held)
                self._entitlements.ticket_lost(held.spending)
                held.report.failed(error)
            else:
                self._let_go(held)
                self._entitlements.ticket_ended(held.spending, begun=False)
                held.spending = held.spending and held.spending.anew()  # if it is used all the same
                held.report.cancelled()
            _log.info(
                "ticket.closed",
                ticket_id=held.ticket_id,
                closing=one.closing,
                runner_id=held.reserved.candidate.runner_id,
                model=held.reserved.candidate.model.artifact.name,
                reason=use.reason if use is not None else "",
                seconds=round(use.seconds, 6) if use is not None else None,
                prompt_tokens=use.prompt_tokens if use is not None else 0,
                output_tokens=use.output_tokens if use is not None else 0,
            )

    def _note(self, held: _Held, use: TicketUse) -> None:
        """A generation that a runner told the end of, as if it had been relayed."""
        error = error_of_reason(use.reason, f"the generation ended with {use.reason}") if use.reason else None
        self._end(held, error)
        model = self._metrics.model(held.reserved.candidate.model.artifact.family)
        model.tokens(prompt=use.prompt_tokens, output=use.output_tokens)
        if use.first_token_s is not None:
            model.first_token(use.first_token_s)
        held.report.told(use, error)
        self._leave(held, tokens=use.output_tokens, well=error is None)
        self._entitlements.ticket_ended(held.spending, prompt=use.prompt_tokens, output=use.output_tokens, begun=True)

    def _end(self, held: _Held, error: ChorusError | None) -> None:
        if held.counted:
            held.counted = False
            self._placing.settle(held.reserved, error)

    def _sweep_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        now = self._live.now
        for held in self._grants.overdue(now):
            self._let_go(held)
        self._settle(self._grants.sweep(now))
        self._timer = None
        if len(self._grants):
            self._sweep_later()

    def _follow(self, change: DirectoryChange) -> None:
        for record in change.removed:
            life = (record.runner.runner_id, record.runner.incarnation)
            watch = self._watches.get(life)
            if watch is not None and watch.up:
                watch.last = (
                    True  # it has more to say: a lease may lapse by mistake, and who leaves ends its streams last
                )
            else:
                self._gone(life)
        for entry in change.upserts:
            runner = entry.record.runner
            for life in [life for life in self._watches if life[0] == runner.runner_id]:
                if life[1] == runner.incarnation:
                    self._watches[life].last = False
                else:
                    self._gone(life)

    def _gone(self, life: RunnerLife) -> None:
        watch = self._watches.pop(life, None)
        if watch is not None and watch.task is not asyncio.current_task():
            watch.task.cancel()
        self._settle(self._grants.gone(life))

    # --- what runners tell ------------------------------------------------------------------------------------------

    async def _heard_from(self, reserved: Running) -> None:
        """Returns once the runner tells what becomes of tickets. Raises UnavailableError where it doesn't."""
        runner = reserved.candidate.entry.record.runner
        life = (runner.runner_id, runner.incarnation)
        watch = self._watches.get(life)
        if watch is None:
            watch = self._watches[life] = _Watch()
            watch.task = asyncio.create_task(self._watch(life, watch), name=f"tickets of {runner.runner_id}")
        with suppress(TimeoutError):
            async with asyncio.timeout(_WATCH_TIMEOUT_S):
                await watch.tried.wait()
        if not watch.up:
            why = watch.problem or f"it has said nothing within {_WATCH_TIMEOUT_S:g} s"
            raise UnavailableError(f"the runner {runner.runner_id} does not tell what becomes of tickets: {why}")

    async def _watch(self, life: RunnerLife, watch: _Watch) -> None:
        while True:
            pause_s = _WATCH_PAUSE_S
            try:
                await self._listen(life, watch)
            except grpc.RpcError as error:
                failure = from_rpc_error(error, peer=f"the runner {life[0]}")
                watch.problem = failure.message
                if isinstance(failure, UnsupportedFeatureError):
                    pause_s = _NO_SUCH_RPC_PAUSE_S
            except ChorusError as error:
                watch.problem = error.message
            watch.up = False
            watch.tried.set()
            if watch.last:
                return self._gone(life)
            self._grants.unheard(life, self._live.now)
            await asyncio.sleep(pause_s)

    async def _listen(self, life: RunnerLife, watch: _Watch) -> None:
        channel = self._pool.get(life[0])
        if channel is None:
            raise UnavailableError("there is no connection to it")
        with channel.used():
            await channel.connected(_WATCH_TIMEOUT_S)
            call = channel.watch_tickets(runner_pb2.WatchTicketsRequest())
            try:
                async for message in call:
                    uses = [decode_use(use) for use in message.uses]
                    told = self._grants.told(life, uses, whole=not watch.up)
                    for held in told.late:
                        self._come_late(held)
                    self._settle(told.closed)
                    watch.up = True
                    watch.tried.set()
            finally:
                call.cancel()


class _Watch:
    """One runner's word: `up` while it can be heard; `tried` once that was found out, the first time.

    `last`: the runner has left the directory, and is listened to for as long as it talks.
    """

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.up = self.last = False
        self.tried = asyncio.Event()
        self.problem = ""
