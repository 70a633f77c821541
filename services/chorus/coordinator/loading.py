"""Has runners load models before requests wait for it: another copy where demand asks for one, or by a pattern."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from chorus.api.runner.v1 import runner_pb2
from chorus.coordinator.admission import Admission
from chorus.coordinator.channels import ChannelPool, RunnerChannel
from chorus.coordinator.events import EventBoard
from chorus.coordinator.live import LiveDirectory
from chorus.coordinator.placing import Placing
from chorus.core.errors import ChorusError
from chorus.core.events import LoadAsked, Subject
from chorus.core.placement import Candidate, Patterns, Replicas, Wanted, load_times
from chorus.telemetry.logs import get_logger
from chorus.wire.errors import from_rpc_error

_LOOK_S = 1.0
_CONNECT_TIMEOUT_S = 3.0
# A large model from a slow disk is in memory by then.
_LOAD_TIMEOUT_S = 1800.0

_log = get_logger()


class Loading:
    """Looks once a second. `busy_s` and `likelihood` are the settings; `wall` is seconds since the Unix epoch."""

    def __init__(
        self,
        live: LiveDirectory,
        placing: Placing,
        pool: ChannelPool,
        admission: Admission,
        events: EventBoard,
        *,
        busy_s: float,
        likelihood: float,
        wall: Callable[[], float],
    ) -> None:
        self._live = live
        self._placing = placing
        self._pool = pool
        self._admission = admission
        self._events = events
        self._replicas = Replicas(busy_s=busy_s)
        self.patterns = Patterns()
        self._likelihood = likelihood
        self._wall = wall
        self._loads: set[asyncio.Task[None]] = set()
        placing.on_start(self._take)

    async def run(self) -> None:
        """Until it is cancelled, with the calls under way; runners go on loading what they have begun."""
        try:
            while True:
                await asyncio.sleep(_LOOK_S)
                self.look()
        finally:
            for task in self._loads:
                task.cancel()

    def look(self) -> None:
        """Asks for what is to be loaded now."""
        directory = self._live.directory
        found = self._replicas.wanted(
            directory,
            self._placing.situation(),
            self._live.now,
            waiting=self._admission.waiting_of_lanes(),
            likely=self.patterns.likely(self._wall(), load_times(directory), self._likelihood),
        )
        for wanted in found:
            task = asyncio.create_task(self._load(wanted))
            self._loads.add(task)
            task.add_done_callback(self._loads.discard)

    def _take(self, candidate: Candidate) -> None:
        self.patterns.asked(candidate.model.artifact.family, self._wall())

    async def _load(self, wanted: Wanted) -> None:
        runner, artifact = wanted.entry.record.runner, wanted.model.artifact
        told = {"runner_id": runner.runner_id, "model": artifact.name}
        _log.info("load.asked", **told, why=wanted.reason, figure=round(wanted.figure, 3))
        subject = Subject("", "", artifact.family, artifact.name, runner.runner_id, runner.node_id)
        self._events.note(LoadAsked(wanted.reason, wanted.figure), subject)
        channel = self._pool.get(runner.runner_id)
        try:
            if channel is not None:
                await _loaded(channel, runner_pb2.LoadModelRequest(model=artifact.name))
        except (ChorusError, grpc.RpcError) as error:
            failure = error if isinstance(error, ChorusError) else from_rpc_error(error, peer="the runner")
            self._replicas.refused(wanted, self._live.now)
            _log.warning("load.refused", **told, reason=failure.reason, why=failure.message)


async def _loaded(channel: RunnerChannel, request: runner_pb2.LoadModelRequest) -> None:
    """Returns once the model is loaded. Raises UnavailableError or RpcErrors."""
    with channel.used():
        await channel.connected(_CONNECT_TIMEOUT_S)
        call: Any = channel.load_model(request, timeout=_LOAD_TIMEOUT_S)
        try:
            async for _ in call:
                pass
        finally:
            call.cancel()
