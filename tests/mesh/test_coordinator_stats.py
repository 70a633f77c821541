"""`GetStats` and the metrics of a running mesh, from several coordinators."""

from __future__ import annotations

from collections import Counter

import pytest

from chorus.core.errors import EngineError, UnavailableError, UnknownModelError
from chorus.core.generation import GenerationRequest, Requirements, TextPrompt
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh


def raw(text: str = "echo:hello", model: str = "", *runner_ids: str) -> GenerationRequest:
    return GenerationRequest(model, TextPrompt(text), requirements=Requirements(runner_ids=runner_ids))


async def test_the_figures_of_all_coordinators_are_added_up(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine()
    async with InProcessMesh(runners=engines, coordinators=2, certificates=certificates) as mesh:
        first, second = (mesh.client(coordinators=[index]) for index in (0, 1))
        for _ in range(3):
            await first.complete(raw())
        await second.complete(raw())
        with pytest.raises(UnknownModelError):
            await second.complete(raw(model="nobody-has-it"))
        for engine in engines:
            engine.fail_next(before=2)
        answer = await first.complete(raw("tell me"))
        seen = await mesh.client().stats()
        total = seen.report.total
        assert not seen.missing
        assert len(seen.asked) == 2
        assert (total.completed, total.failed, total.refused) == (5, Counter(), Counter(UNKNOWN_MODEL=1))
        assert (total.failed_attempts["ENGINE_FAILED"], total.resumed, total.local_share) == (2, 1, 1.0)
        assert total.first_token.count == 5
        assert set(seen.report.nodes) == {"node-of-runner-1", "node-of-runner-2"}
        assert seen.report.models[answer.model].completed == 5
        assert seen.report.models["nobody-has-it"].refused.total() == 1
        metrics = mesh.coordinator_metrics[0].get_sample_value
        assert metrics("chorus_requests_finished_total", {"outcome": "completed"}) == 4
        assert metrics("chorus_generation_breaks_total", {"reason": "ENGINE_FAILED"}) == 2
        assert metrics("chorus_generation_resumes_total", {"reason": "ENGINE_FAILED"}) == 1
        other = mesh.coordinator_metrics[1].get_sample_value
        assert other("chorus_requests_refused_total", {"reason": "UNKNOWN_MODEL"}) == 1


async def test_a_coordinator_that_does_not_answer_is_named(certificates: MeshCertificates) -> None:
    async with InProcessMesh(coordinators=2, certificates=certificates) as mesh:
        client = mesh.client(timeout_s=10.0)
        await mesh.coordinators[1].stop(0.0)
        seen = await client.stats()
        assert [name.partition("@")[0] for name in seen.missing] == ["coordinator-2"]
        await mesh.coordinators[0].stop(0.0)
        with pytest.raises(UnavailableError):
            await client.stats()


async def test_requests_that_fail_are_counted_by_machine(certificates: MeshCertificates) -> None:
    engine = FakeEngine()
    async with InProcessMesh(runners=[engine], certificates=certificates, coordinator={"max_attempts": 1}) as mesh:
        engine.fail_next()
        with pytest.raises(EngineError):
            await mesh.client().complete(raw())
        node = (await mesh.client().stats()).report.nodes["node-of-runner-1"]
        assert (node.failed, node.failed_attempts) == (Counter(ENGINE_FAILED=1), Counter(ENGINE_FAILED=1))
