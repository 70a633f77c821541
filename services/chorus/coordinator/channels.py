"""One warm channel to every live runner, so that no request waits for a TLS handshake.

A channel is dialled when its runner enters the directory, and kept connected. When the connection breaks, whoever
places requests hears of it at once, long before the runner's lease lapses. A channel whose runner has left is closed
when the last call on it has ended: a lease that lapsed by mistake must not cut a stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import grpc
import grpc.aio

from chorus.api.runner.v1 import runner_pb2
from chorus.core.errors import ChorusError, UnavailableError
from chorus.core.fleet.directory import DirectoryChange
from chorus.core.fleet.records import Runner
from chorus.core.resilience.retries import LOST
from chorus.telemetry.logs import get_logger
from chorus.transport.channel import open_channel
from chorus.transport.guarding import QUESTION_TIMEOUT_S, Question
from chorus.transport.renewing import is_shut_out
from chorus.transport.tls import TlsIdentity
from chorus.wire.errors import from_rpc_error

_SERVICE = "/chorus.api.runner.v1.ModelRunner"
_PROBE_PAUSE_S = 0.25
_Connectivity = grpc.ChannelConnectivity

_log = get_logger()


class Connections(Protocol):
    """Is told how the connections to runners fare."""

    def runner_lost(self, runner_id: str, incarnation: int) -> None:
        """The connection to a runner broke, or cannot be made."""

    def runner_found(self, runner_id: str) -> None:
        """There is a connection again."""


class RunnerChannel:
    """The channel to one incarnation of a runner."""

    def __init__(
        self, runner: Runner, connections: Connections, *, identity: TlsIdentity | None, insecure_loopback: bool
    ) -> None:
        self.runner_id = runner.runner_id
        self._incarnation = runner.incarnation
        self._dialled = (runner.incarnation, runner.address, runner.server_name)
        self._connections = connections
        self._channel = open_channel(
            runner.address, identity=identity, server=runner.server_name, insecure_loopback=insecure_loopback
        )
        self._ready = asyncio.Event()
        self._problem = ""
        self._users = 0
        self._retired = False
        self._left_unconnected = False
        self._on_retired: set[Callable[[], None]] = set()
        # Answers stay bytes: a coordinator passes them on as they are.
        self.generate: Any = self._channel.unary_stream(
            f"{_SERVICE}/Generate", request_serializer=runner_pb2.GenerateRequest.SerializeToString
        )
        self.embed: Any = self._channel.unary_unary(
            f"{_SERVICE}/Embed", request_serializer=runner_pb2.EmbedRequest.SerializeToString
        )
        self.rerank: Any = self._channel.unary_unary(
            f"{_SERVICE}/Rerank", request_serializer=runner_pb2.RerankRequest.SerializeToString
        )
        self.count_tokens: Any = self._channel.unary_unary(
            f"{_SERVICE}/CountTokens", request_serializer=runner_pb2.CountTokensRequest.SerializeToString
        )
        self.watch_tickets: Any = self._channel.unary_stream(
            f"{_SERVICE}/WatchTickets",
            request_serializer=runner_pb2.WatchTicketsRequest.SerializeToString,
            response_deserializer=runner_pb2.WatchTicketsResponse.FromString,
        )
        self.load_model: Any = self._channel.unary_stream(
            f"{_SERVICE}/LoadModel", request_serializer=runner_pb2.LoadModelRequest.SerializeToString
        )
        self._get_node: Any = self._channel.unary_unary(
            f"{_SERVICE}/GetNode", request_serializer=runner_pb2.GetNodeRequest.SerializeToString
        )
        self._watching = asyncio.create_task(self._watch())
        self._question = Question(self._get_node, runner_pb2.GetNodeRequest())
        self._recovering: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def called(self) -> str:
        """Who this leads to, in words."""
        return f"the runner {self.runner_id}"

    @property
    def is_closed(self) -> bool:
        """Whether it was retired and is closed."""
        return self._closing is not None and self._closing.done()

    def leads_to(self, runner: Runner) -> bool:
        """Whether it is the channel to this very incarnation, there."""
        return self._dialled == (runner.incarnation, runner.address, runner.server_name)

    async def connected(self, timeout_s: float) -> None:
        """Returns once there is a connection, which there is as a rule. Raises UnavailableError after `timeout_s`."""
        if not self._ready.is_set():
            try:
                async with asyncio.timeout(timeout_s):
                    await self._ready.wait()
            except TimeoutError:
                why = self._problem or f"there was no connection to the runner {self.runner_id} within {timeout_s:g} s"
                raise UnavailableError(why, metadata={LOST: "true"}) from None
        if self._left_unconnected:
            raise UnavailableError(f"the runner {self.runner_id} has left the mesh", metadata={LOST: "true"})

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keeps the channel open for as long as a call on it goes on."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._close_if_done()

    @contextmanager
    def told_when_retired(self, callback: Callable[[], None]) -> Iterator[None]:
        """Calls `callback` if the runner leaves the mesh before the block is left."""
        self._on_retired.add(callback)
        try:
            yield
        finally:
            self._on_retired.discard(callback)

    @property
    def is_shut_out(self) -> bool:
        """Whether it was revoked."""
        return is_shut_out(self._channel)

    def ask(self) -> asyncio.Task[bool]:
        """Asks the runner whether it lives, once for all who ask meanwhile; the result is whether it said anything."""
        return self._question.ask()

    def suspect(self) -> None:
        """A stream has found the runner silent: nobody is sent there until it answers.

        Its connection may be open, as that of a process that stands still is, and would be for many seconds.
        """
        if not self._retired and (self._recovering is None or self._recovering.done()):
            _log.warning("runner.silent", runner_id=self.runner_id, incarnation=self._incarnation)
            self._connections.runner_lost(self.runner_id, self._incarnation)
            self._recovering = asyncio.create_task(self._recover())

    def retire(self) -> None:
        """Closes it as soon as nobody uses it; what becomes of its connection is nobody's concern any more."""
        self._retired = True
        self._watching.cancel()
        if self._recovering is not None:
            self._recovering.cancel()
        for callback in tuple(self._on_retired):
            callback()
        if not self._ready.is_set():
            self._left_unconnected = True
            self._ready.set()  # nobody need wait any longer
        self._close_if_done()

    async def close(self) -> None:
        """Closes it now; calls on it end."""
        tasks = {task for task in (self._watching, self._recovering) if task is not None}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self._question.close()
        if self._closing is not None:
            await asyncio.wait({self._closing})
        else:
            await self._channel.close()

    def _close_if_done(self) -> None:
        if self._retired and self._users == 0 and self._closing is None:
            self._closing = asyncio.create_task(self._channel.close())

    async def _watch(self) -> None:
        """Keeps the connection up, and tells how it fares."""
        told_lost = False
        while True:
            state = self._channel.get_state(try_to_connect=True)
            if state is _Connectivity.SHUTDOWN:
                return
            if state is _Connectivity.READY:
                self._ready.set()
                self._connections.runner_found(self.runner_id)
                if told_lost:
                    _log.info("runner.reachable", runner_id=self.runner_id, incarnation=self._incarnation)
                told_lost, self._problem = False, ""
            elif self._ready.is_set() or state is _Connectivity.TRANSIENT_FAILURE:
                self._ready.clear()
                self._connections.runner_lost(self.runner_id, self._incarnation)
                if not told_lost and state is _Connectivity.TRANSIENT_FAILURE:
                    told_lost = True
                    await self._tell_why_lost()
            await self._channel.wait_for_state_change(state)

    async def _recover(self) -> None:
        while True:
            if await asyncio.shield(self.ask()):
                _log.info("runner.answers", runner_id=self.runner_id, incarnation=self._incarnation)
                return self._connections.runner_found(self.runner_id)
            await asyncio.sleep(_PROBE_PAUSE_S)

    async def _tell_why_lost(self) -> None:
        """A channel does not say why it cannot connect; a call that fails on it does."""
        try:
            await self._get_node(runner_pb2.GetNodeRequest(), timeout=QUESTION_TIMEOUT_S)
        except grpc.RpcError as error:
            failure: ChorusError = from_rpc_error(error, peer=f"the runner {self.runner_id}")
            self._problem = failure.message
            _log.warning(
                "runner.unreachable",
                runner_id=self.runner_id,
                incarnation=self._incarnation,
                reason=failure.reason,
                why=failure.message,
            )


class ChannelPool:
    """The channels to all live runners. Used from one event loop."""

    def __init__(self, connections: Connections, *, identity: TlsIdentity | None, insecure_loopback: bool) -> None:
        self._connections = connections
        self._identity = identity
        self._insecure_loopback = insecure_loopback
        self._channels: dict[str, RunnerChannel] = {}
        self._retired: set[RunnerChannel] = set()

    def get(self, runner_id: str) -> RunnerChannel | None:
        """The channel to a runner of the directory; None where it could not be dialled, or has left."""
        return self._channels.get(runner_id)

    def follow(self, change: DirectoryChange) -> None:
        """Dials who is new and lets go of who has left."""
        for record in change.removed:
            self._retire(record.runner.runner_id)
        for entry in change.upserts:
            runner = entry.record.runner
            known = self._channels.get(runner.runner_id)
            if known is not None and known.leads_to(runner):
                continue
            self._retire(runner.runner_id)
            try:
                self._channels[runner.runner_id] = RunnerChannel(
                    runner, self._connections, identity=self._identity, insecure_loopback=self._insecure_loopback
                )
            except ChorusError as error:  # an address that can't be dialled
                _log.warning("runner.undiallable", runner_id=runner.runner_id, why=error.message)

    async def close(self) -> None:
        """Closes every channel."""
        channels = [*self._channels.values(), *self._retired]
        self._channels.clear()
        self._retired.clear()
        await asyncio.gather(*(channel.close() for channel in channels))

    def _retire(self, runner_id: str) -> None:
        channel = self._channels.pop(runner_id, None)
        if channel is not None:
            self._retired = {retired for retired in self._retired if not retired.is_closed}
            self._retired.add(channel)
            channel.retire()
