"""A runner that fails everything at once looks idle, and must not draw the traffic."""

from __future__ import annotations

import asyncio

from chorus.core.errors import EngineError
from chorus.core.generation import GenerationRequest, TextPrompt
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh


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
