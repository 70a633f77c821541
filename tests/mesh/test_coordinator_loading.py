"""A model that is loaded nowhere, in a running mesh with two coordinators: it is loaded once, and waited for."""

from __future__ import annotations

import asyncio

from chorus.core.fleet.records import ModelState
from chorus.core.generation import GenerationRequest, Phase, Progress, TextPrompt
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine, FakeModel
from chorus.testing.mesh import InProcessMesh

HELLO = GenerationRequest("", TextPrompt("echo:hello"))


async def test_all_requests_of_all_coordinators_wait_for_one_load(certificates: MeshCertificates) -> None:
    engines = [FakeEngine([FakeModel(loaded=False)], load_delay_s=0.4, slots=64) for _ in range(4)]
    async with (
        asyncio.timeout(60),
        InProcessMesh(runners=engines, coordinators=2, certificates=certificates) as mesh,
    ):
        clients = [mesh.client(coordinators=[index]) for index in (0, 1)]
        phases: list[Phase] = []

        async def ask(number: int) -> None:
            async with clients[number % 2].generate(HELLO) as generation:
                phases.extend([event.phase async for event in generation if isinstance(event, Progress)])

        await asyncio.gather(*(ask(number) for number in range(16)))
        loaded = [engine for engine in engines if engine.models()[0].state is ModelState.LOADED]
        assert len(loaded) == 1
        assert Phase.LOADING in phases
