"""No black holes: a runner that fails at once must not draw the traffic, nor one that is silent hold it."""

from __future__ import annotations

import asyncio

from chorus.core.errors import EngineError
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.records import RunnerState
from chorus.core.generation import GenerationRequest, TextPrompt
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace


def slots_used(directory: Directory, runner_id: str) -> int:
    entry = directory.get(runner_id)
    return sum(load.slots_used for load in entry.record.load.models) if entry is not None else -1


def is_ready(directory: Directory, runner_id: str) -> bool:
    entry = directory.get(runner_id)
    return entry is not None and entry.record.state is RunnerState.READY


async def test_a_runner_that_fails_everything_gets_next_to_nothing(certificates: MeshCertificates) -> None:
    engines = [FakeEngine(), FakeEngine(), FakeEngine()]
    broken = engines[1]
    broken.fail_next(error=EngineError("broken"), times=1000)
    request = GenerationRequest(model="", prompt=TextPrompt("echo:hello"))
    async with asyncio.timeout(60), InProcessMesh(runners=engines, certificates=certificates) as mesh:
        client = mesh.client()
        for _ in range(30):  # everybody is answered: whoever was sent there goes on elsewhere
            answers = await asyncio.gather(*(client.complete(request) for _ in range(8)))
            assert {answer.text for answer in answers} == {"hello"}
    # At most the first handful, which came before the first failure was seen.
    assert 1000 - len(broken.faults) <= 8


async def test_a_runner_that_falls_silent_is_not_waited_for(certificates: MeshCertificates) -> None:
    hung = FakeEngine()
    hung.hang_next()
    request = GenerationRequest(model="", prompt=TextPrompt("echo:hello"))
    async with asyncio.timeout(60), InProcessMesh(runners=[hung], certificates=certificates) as mesh:
        answer = asyncio.create_task(mesh.client().complete(request))
        await mesh.until(lambda directory: slots_used(directory, "runner-1") == 1)
        await mesh.add_runner()
        await mesh.until(lambda directory: is_ready(directory, "runner-2"))
        assert not answer.done()
        await mesh.silence_runner(0)  # its connection stays, its lease does not
        assert (await answer).text == "hello"


async def test_the_only_runner_is_waited_for_while_its_connection_lasts(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    request = GenerationRequest(model="", prompt=TextPrompt("echo:hello"))
    async with asyncio.timeout(60), InProcessMesh(runners=[FakeEngine(pace=pace)], certificates=certificates) as mesh:
        answer = asyncio.create_task(mesh.client().complete(request))
        await mesh.until(lambda directory: slots_used(directory, "runner-1") == 1)
        await mesh.silence_runner(0)  # as where only its way to the registry is broken
        await mesh.until(lambda directory: "runner-1" not in directory.entries)
        pace.release(100)
        assert (await answer).text == "hello"
