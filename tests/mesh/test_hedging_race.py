"""The race of two attempts, cancelled at each of its steps: no call to a runner is left open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from chorus.api.inference.v1 import generation_pb2
from chorus.api.runner.v1 import runner_pb2
from chorus.coordinator.hedging import Hedging, Race
from chorus.coordinator.placing import Running
from chorus.core.generation import Priority
from chorus.core.placement import NO_TRACE, Needs, place
from chorus.core.resilience.breakers import Breakers
from chorus.core.resilience.hedging import LEAST_SAMPLES, HedgeMode
from chorus.core.resilience.stream_silence import StreamWatch, patience_with
from chorus.telemetry.metrics import GenerationMetrics
from tests.core import placement_fleet as fleet

TOKEN = runner_pb2.GenerateResponse(
    event=generation_pb2.GenerationEvent(delta=generation_pb2.TokenDelta(token_ids=[1], text="a"))
).SerializeToString()


class Calls:
    """Calls to runners; each brings its first token after some turns of the event loop, and takes some to end."""

    def __init__(self, turns: list[int]) -> None:
        self.open = 0
        self.kept: list[Any] = []  # so that none is ended by being collected
        self._turns = iter(turns)

    @asynccontextmanager
    async def _called(self, turns: int) -> AsyncIterator[Any]:
        async def messages() -> AsyncIterator[bytes]:
            for _ in range(turns):
                await asyncio.sleep(0)
            yield TOKEN

        self.open += 1
        try:
            yield messages(), SimpleNamespace(watch=StreamWatch(patience_with(Priority.INTERACTIVE), 0.0))
        finally:
            self.open -= 1

    def __call__(self, running: Running, message: Any) -> Any:
        self.kept.append(self._called(next(self._turns)))
        return self.kept[-1]


class TwoRunners:
    """Placement that always has a second runner, and keeps the books."""

    def __init__(self) -> None:
        directory = fleet.directory(fleet.runner("r1", fleet.model("alpha")), fleet.runner("r2", fleet.model("alpha")))
        self.needs = Needs(model="alpha")
        candidate = place(self.needs, directory, rng=Random(1))
        self.first = Running(candidate, Breakers().began("r1", "alpha.gguf", 1, 0.0))
        self._second = Running(candidate, Breakers().began("r2", "alpha.gguf", 1, 0.0), number=2)
        self.hedges = 0

    def hedge(self, *_: Any, **__: Any) -> Running:
        self.hedges += 1
        return self._second

    def settle(self, *_: Any, **__: Any) -> None:
        self.hedges -= 1

    outrun = settle


@pytest.mark.parametrize("turns", [[3], [40, 3], [8, 8], [3, 40]])
async def test_a_race_that_is_cancelled_at_any_step_leaves_no_call_open(turns: list[int]) -> None:
    finished = 0
    for steps in range(60):
        runners, calls = TwoRunners(), Calls(turns)
        hedging = Hedging(
            runners,  # type: ignore[arg-type]
            HedgeMode.ALWAYS,
            clock=lambda: 0.0,
            metrics=GenerationMetrics(CollectorRegistry()),
        )
        if len(turns) > 1:
            for _ in range(LEAST_SAMPLES):
                hedging._times.note(runners.first.candidate.model.artifact.name, 0, 0.0)
        race = Race(hedging, runners.first, calls, lambda _: None, runners.needs, NO_TRACE)  # type: ignore[arg-type]

        async def write(_: bytes) -> None:
            raise AssertionError("nothing is told before the first token")

        async def read(race: Race = race) -> list[bytes]:
            async with race.run(runner_pb2.GenerateRequest(), write) as (messages, _):
                return [raw async for raw in messages]

        task = asyncio.create_task(read())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        for _ in range(5):
            await asyncio.sleep(0)
        assert (calls.open, runners.hedges) == (0, 0), steps
        finished += result == [TOKEN]
    assert 0 < finished < 60
