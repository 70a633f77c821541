"""Runners load models that no request waits for, in a running mesh: another copy by demand, and by a pattern."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from chorus.core.events import Event, EventFilter, EventKind, LoadAsked
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.records import ModelState
from chorus.core.placement import LoadReason
from chorus.core.placement.patterns import DAY_S
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine, FakeModel
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace

NINE = 20_000 * DAY_S + 9 * 3600.0


def stands(directory: Directory, runner_id: str, state: ModelState) -> bool:
    entry = directory.get(runner_id)
    return entry is not None and all(status.state is state for status in entry.record.runner.models)


async def test_a_full_model_gets_another_copy_and_one_that_is_usual_is_there_before_it_is_asked_for(
    certificates: MeshCertificates,
) -> None:
    full, spare = FakeEngine(slots=1, pace=ManualPace()), FakeEngine([FakeModel(loaded=False)])
    settings = {"replicate_busy_s": 0.1}
    async with (
        asyncio.timeout(90),
        InProcessMesh(runners=[full, spare], coordinators=2, certificates=certificates, coordinator=settings) as mesh,
    ):
        wall = [NINE]
        for service in mesh.coordinators:
            service._loading._wall = lambda: wall[0]
        client = mesh.client()
        asking = [asyncio.create_task(client.complete("a", max_tokens=2)) for _ in range(2)]
        await mesh.until(lambda directory: stands(directory, "runner-2", ModelState.LOADED))
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        # From now on the first runner is gone, the second one's model is unloaded, and days pass.
        await mesh.runners[0].stop(0.0)
        only = mesh.client(coordinators=[0])
        for day in range(2):
            wall[0] = NINE + day * DAY_S
            await only.complete("echo:morning", max_tokens=2, model="fake-1b")
            await spare.unload("fake-1b")
            await mesh.until(lambda directory: stands(directory, "runner-2", ModelState.AVAILABLE))
        wall[0] = NINE + 2 * DAY_S - 10.0
        replicas = mesh.coordinators[0]._loading._replicas
        for kept in (replicas._not_before, replicas._loading):
            kept.clear()  # this clock goes on as ever, and days are seconds here
        await mesh.until(lambda directory: stands(directory, "runner-2", ModelState.LOADED))
        seen: list[Event] = []
        condition = EventFilter(kinds=frozenset({EventKind.LOAD_ASKED}))
        async with aclosing(only.watch_events(condition, since_s=3600.0)) as news:
            async for one in news:
                event = getattr(one, "event", None)
                seen += [event] if isinstance(event, Event) else []
                if seen and isinstance(seen[-1].detail, LoadAsked) and seen[-1].detail.reason is LoadReason.PATTERN:
                    break
        assert {event.subject.runner_id for event in seen} == {"runner-2"}
