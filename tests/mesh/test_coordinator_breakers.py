"""Circuit breakers in a running mesh: who keeps failing is left alone, and found again."""

from __future__ import annotations

import asyncio

import pytest

from chorus.core.errors import EngineError, InvalidRequestError, OverloadedError
from chorus.core.generation import GenerationRequest, Requirements, TextPrompt
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh

HOURS_S = 3600.0


def asked(*runner_ids: str) -> GenerationRequest:
    return GenerationRequest("", TextPrompt("echo:hello"), requirements=Requirements(runner_ids=runner_ids))


def changes(mesh: InProcessMesh, state: str) -> float:
    return mesh.coordinator_metrics[0].get_sample_value("chorus_generation_breakers_total", {"state": state}) or 0.0


async def fail(mesh: InProcessMesh, engine: FakeEngine, *, times: int, error: Exception | None = None) -> None:
    """Has requests for the second runner alone fail there."""
    for _ in range(times):
        engine.fail_next(error=error or EngineError("broken"))  # type: ignore[arg-type]
        with pytest.raises(type(error or EngineError("broken"))):
            await mesh.client().complete(asked("runner-2"))


async def rejections(mesh: InProcessMesh) -> list[tuple[str, str]]:
    explanation = await mesh.client().explain_placement(asked())
    return [(rejected.runner_id, rejected.reason) for rejected in explanation.rejected]


async def test_who_keeps_failing_is_left_alone_while_somebody_else_can_answer(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine()
    settings = {"breaker_failures": 3, "breaker_open_s": HOURS_S}
    async with InProcessMesh(runners=engines, certificates=certificates, coordinator=settings) as mesh:
        await fail(mesh, engines[1], times=2)
        assert (await rejections(mesh), changes(mesh, "open")) == ([], 0)
        await fail(mesh, engines[1], times=1)
        assert (await rejections(mesh), changes(mesh, "open")) == ([("runner-2", "breaker_open")], 1)
        answers = await asyncio.gather(*(mesh.client().complete(asked()) for _ in range(20)))
        assert {answer.runner_id for answer in answers} == {"runner-1"}
        # Nobody else may answer this one: it is asked all the same, and its success closes the breaker.
        assert (await mesh.client().complete(asked("runner-2"))).text == "hello"
        assert (await rejections(mesh), changes(mesh, "closed")) == ([], 1)


async def test_after_a_pause_a_probe_goes_there(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine()
    settings = {"breaker_failures": 1, "breaker_open_s": 1e-6}
    async with InProcessMesh(runners=engines, certificates=certificates, coordinator=settings) as mesh:
        await fail(mesh, engines[1], times=1)
        assert await rejections(mesh) == []  # half open by now
        await fail(mesh, engines[1], times=1)
        assert (changes(mesh, "open"), changes(mesh, "closed")) == (2, 0)
        await mesh.client().complete(asked("runner-2"))
        assert (changes(mesh, "open"), changes(mesh, "closed")) == (2, 1)


async def test_what_is_no_fault_of_the_runner_never_counts(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine()
    async with InProcessMesh(
        runners=engines, certificates=certificates, coordinator={"breaker_failures": 1, "breaker_open_s": HOURS_S}
    ) as mesh:
        await fail(mesh, engines[1], times=3, error=OverloadedError("full", retry_after_s=1.0))
        await fail(mesh, engines[1], times=3, error=InvalidRequestError("prompt", "is odd"))
        engines[1].hang_next()
        hanging = asyncio.create_task(mesh.client().complete(asked("runner-2")))
        await mesh.until(
            lambda directory: any(load.slots_used for load in directory.entries["runner-2"].record.load.models)
        )
        hanging.cancel()
        await mesh.until(
            lambda directory: not any(load.slots_used for load in directory.entries["runner-2"].record.load.models)
        )
        assert (await rejections(mesh), changes(mesh, "open")) == ([], 0)


async def test_a_new_process_starts_with_closed_breakers(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine()
    async with InProcessMesh(
        runners=engines, certificates=certificates, coordinator={"breaker_failures": 1, "breaker_open_s": HOURS_S}
    ) as mesh:
        await fail(mesh, engines[1], times=1)
        assert await rejections(mesh) == [("runner-2", "breaker_open")]
        before = mesh.runners[1].presence.incarnation
        await mesh.runners[1].stop(0.0)
        mesh.runners.pop()
        await mesh.add_runner(name="runner-2")
        await mesh.until(
            lambda directory: (
                "runner-2" in directory.entries
                and directory.entries["runner-2"].record.runner.incarnation > before
                and directory.entries["runner-2"].reachable
                and directory.entries["runner-2"].record.state == "ready"
            )
        )
        assert await rejections(mesh) == []
