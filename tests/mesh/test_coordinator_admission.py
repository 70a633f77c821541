"""Requests that wait at a coordinator: told so, in a fair order, and let go when it is their turn."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from chorus.client import Completion, MeshClient
from chorus.coordinator.admission import Admission, Asking
from chorus.core.errors import DeadlineExceededError, OverloadedError
from chorus.core.fleet.directory import Directory
from chorus.core.generation import Finished, GenerationRequest, Priority, Queued, TextPrompt, TokenDelta
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace

INTERACTIVE, BATCH, BACKGROUND = Priority.INTERACTIVE, Priority.BATCH, Priority.BACKGROUND


def asked(priority: Priority = INTERACTIVE, text: str = "hello") -> GenerationRequest:
    return GenerationRequest("", TextPrompt(f"echo:{text}"), priority=priority)


def gauge(mesh: InProcessMesh, state: str) -> float | None:
    return mesh.coordinator_metrics[0].get_sample_value("chorus_admission_requests", {"state": state})


class Waiter:
    """A request that is known to wait at the coordinator; `order` takes its name when it is answered."""

    def __init__(self, client: MeshClient, request: GenerationRequest, name: str, order: list[str]) -> None:
        self._stream = client.generate(request)
        self._name, self._order = name, order
        self.position = -1
        self.answer: asyncio.Task[None] | None = None

    async def queued(self) -> Waiter:
        event = await anext(self._stream)
        assert isinstance(event, Queued)
        self.position = event.position
        self.answer = asyncio.create_task(self._read())
        return self

    async def leave(self) -> None:
        assert self.answer is not None
        self.answer.cancel()
        await asyncio.wait({self.answer})
        await self._stream.aclose()

    async def _read(self) -> None:
        started = False
        async for event in self._stream:
            if not started and isinstance(event, TokenDelta | Finished):
                started = True
                self._order.append(self._name)


async def running(client: MeshClient, pace: ManualPace, count: int = 1) -> asyncio.Future[list[Completion]]:
    """Has so many requests run at an engine where none ran before; they go on until the pace lets them."""
    answers = asyncio.gather(*(client.complete(asked()) for _ in range(count)))
    await pace.waiting(count)
    return answers


async def test_who_finds_no_place_waits_is_told_and_is_answered_in_turn(certificates: MeshCertificates) -> None:
    pace, order = ManualPace(), list[str]()
    async with InProcessMesh(
        runners=[FakeEngine(pace=pace)], certificates=certificates, coordinator={"max_requests": 1}
    ) as mesh:
        client = mesh.client()
        first = await running(client, pace)
        waiters = [await Waiter(client, asked(), name, order).queued() for name in "abc"]
        assert [waiter.position for waiter in waiters] == [0, 1, 2]
        assert (gauge(mesh, "running"), gauge(mesh, "waiting")) == (1, 3)
        pace.release_all()
        await asyncio.gather(first, *(waiter.answer for waiter in waiters if waiter.answer))
        assert order == ["a", "b", "c"]
        assert gauge(mesh, "waiting") == 0


async def test_callers_take_turns_and_classes_come_in_order(certificates: MeshCertificates) -> None:
    pace, order = ManualPace(), list[str]()
    async with InProcessMesh(
        runners=[FakeEngine(pace=pace)], certificates=certificates, coordinator={"max_requests": 1}
    ) as mesh:
        greedy, modest = mesh.client(name="greedy"), mesh.client(name="modest")
        waiting: list[asyncio.Future[Any]] = [await running(greedy, pace)]
        for client, priority, name in (
            (greedy, BACKGROUND, "background"),
            (greedy, BATCH, "batch"),
            (greedy, INTERACTIVE, "greedy-1"),
            (greedy, INTERACTIVE, "greedy-2"),
            (greedy, INTERACTIVE, "greedy-3"),
            (modest, INTERACTIVE, "modest"),
        ):
            waiter = await Waiter(client, asked(priority), name, order).queued()
            assert waiter.answer is not None
            waiting.append(waiter.answer)
        pace.release_all()
        await asyncio.gather(*waiting)
        assert order.index("modest") <= 1
        assert [name for name in order if name != "modest"] == [
            "greedy-1",
            "greedy-2",
            "greedy-3",
            "batch",
            "background",
        ]


async def test_who_goes_away_gives_up_its_turn(certificates: MeshCertificates) -> None:
    pace, order = ManualPace(), list[str]()
    async with InProcessMesh(
        runners=[FakeEngine(pace=pace)], certificates=certificates, coordinator={"max_requests": 1, "max_queued": 1}
    ) as mesh:
        client = mesh.client()
        first = await running(client, pace)
        gone = await Waiter(client, asked(), "gone", order).queued()
        with pytest.raises(OverloadedError) as caught:
            await client.complete(asked())
        assert caught.value.retry_after_s
        await gone.leave()
        short = mesh.client(timeout_s=0.2)
        with pytest.raises((DeadlineExceededError, OverloadedError)):
            await short.complete(asked())
        pace.release_all()
        await first
        assert (await client.complete(asked(text="whole"))).text == "whole"
        assert order == []
        assert gauge(mesh, "waiting") == 0


async def test_a_model_is_given_no_more_than_its_runners_can_soon_take(certificates: MeshCertificates) -> None:
    pace, order = ManualPace(), list[str]()
    engine = FakeEngine(pace=pace, slots=1)
    async with InProcessMesh(runners=[engine], certificates=certificates) as mesh:
        client = mesh.client()
        under_way = await running(client, pace)
        second = client.generate(asked())
        assert isinstance(await anext(second), Queued)  # at the runner, which has one slot
        third = await Waiter(client, asked(), "third", order).queued()
        assert (gauge(mesh, "running"), gauge(mesh, "waiting")) == (2, 1)
        # Another runner means more slots: whoever waits may go there.
        await mesh.add_runner(FakeEngine(slots=1))
        assert third.answer is not None
        await third.answer
        assert order == ["third"]
        pace.release_all()
        assert isinstance([event async for event in second][-1], Finished)
        await under_way


def reported_slots(directory: Directory) -> int:
    return sum(load.slots_used for load in directory.entries["runner-1"].record.load.models)


async def test_background_work_waits_while_every_node_is_busy(certificates: MeshCertificates) -> None:
    pace, order = ManualPace(), list[str]()
    async with InProcessMesh(runners=[FakeEngine(pace=pace, slots=5)], certificates=certificates) as mesh:
        client = mesh.client()
        busy = await running(client, pace, 4)
        await mesh.until(lambda directory: reported_slots(directory) == 4)
        background = await Waiter(client, asked(BACKGROUND), "background", order).queued()
        # The fifth slot is for those who are in a hurry.
        urgent = asyncio.create_task(client.complete(asked()))
        await pace.waiting(5)
        assert order == []
        assert background.answer is not None
        pace.release_all()
        await asyncio.gather(busy, urgent, background.answer)
        assert order == ["background"]


# --- with a clock of our own ----------------------------------------------------------------------------------------


class OneSlot:
    """A mesh with one slot for everything."""

    def slots(self, lane: str) -> int | None:
        return 1

    def has_quiet_node(self, lane: str) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_who_cannot_be_done_in_time_is_refused_at_once() -> None:
    clock = Clock()
    admission = Admission(OneSlot(), limit=1, max_queued=10, clock=clock)
    for _ in range(8):
        async with admission.admitted(Asking("a", lane="m")):
            clock.now += 10.0
    async with admission.admitted(Asking("a", lane="m")):
        with pytest.raises(OverloadedError) as caught:
            async with admission.admitted(Asking("b", lane="m", time_left_s=12.0)):
                pass
        assert caught.value.retry_after_s == pytest.approx(10.0)
        assert (admission.running, admission.waiting) == (1, 0)


async def test_nobody_makes_way_for_who_does_not_wait() -> None:
    admission = Admission(OneSlot(), limit=1, max_queued=2, clock=Clock())
    async with admission.admitted(Asking("a", lane="m")):
        told = asyncio.Queue[int]()
        asked = Asking("b", lane="m")
        waiting = [
            asyncio.create_task(admission.enter(asked, lambda position, _: told.put(position))) for _ in range(2)
        ]
        assert [await told.get(), await told.get()] == [0, 1]
        for _ in range(3):
            with pytest.raises(OverloadedError, match="no place now"):
                await admission.enter(Asking("c", lane="m"), wait=False)
        assert admission.waiting == 2
        for task in waiting:
            task.cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(end) for end in ended} == {asyncio.CancelledError}
    assert (admission.running, admission.waiting) == (0, 0)


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_cancelled_at_any_moment_nothing_is_left(cancelled_first: bool) -> None:
    admission = Admission(OneSlot(), limit=1, max_queued=10, clock=Clock())
    leave, told = asyncio.Event(), asyncio.Queue[int]()

    async def hold() -> None:
        async with admission.admitted(Asking("a", lane="m"), lambda position, _: told.put(position)):
            await leave.wait()

    holder, waiter, last = (asyncio.create_task(hold()) for _ in range(3))
    assert [await told.get(), await told.get()] == [0, 1]
    leave.set()
    if cancelled_first:  # its turn comes while its cancellation is on the way
        waiter.cancel()
        await holder
    else:  # its turn has come, and it has not run since
        await holder
        waiter.cancel()
    await asyncio.wait({waiter, last})
    assert last.exception() is None
    assert (admission.running, admission.waiting) == (0, 0)
