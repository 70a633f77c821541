"""What a coordinator logs and measures: every request with how it ended, and never what was asked."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from chorus.core.errors import EngineError
from chorus.core.generation import GenerationRequest, TextPrompt, TokenDelta
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace

SECRET = "my-secret-diary"


def asked() -> GenerationRequest:
    return GenerationRequest(model="", prompt=TextPrompt(f"echo:{SECRET}"))


async def test_each_end_of_a_request_is_one_line_without_its_text(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    engine = FakeEngine(pace=pace)
    with capture_logs() as lines:
        async with InProcessMesh(runners=[engine], certificates=certificates) as mesh:
            client = mesh.client()
            pace.release(len(SECRET) + 1)
            await client.complete(asked())
            engine.fail_next()
            with pytest.raises(EngineError):
                await client.complete(asked())
            async with client.generate(asked()) as generation:
                pace.release()
                while not isinstance(await anext(generation), TokenDelta):
                    pass
    ends = [line for line in lines if str(line["event"]).startswith("request.")]
    assert [line["event"] for line in ends] == ["request.finished", "request.failed", "request.cancelled"]
    finished, failed, cancelled = ends
    assert (finished["model"], finished["runner_id"], finished["attempts"]) == ("fake-1b", "runner-1", 1)
    assert finished["output_tokens"] == len(SECRET) + 1
    assert finished["seconds"] >= finished["ttft_s"] > 0
    assert (failed["reason"], failed["output_tokens"]) == ("ENGINE_FAILED", 0)
    assert cancelled["output_tokens"] == 1
    assert SECRET not in repr(lines)


async def test_attempts_retries_and_tokens_are_counted(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine()
    async with InProcessMesh(runners=engines, certificates=certificates) as mesh:
        for engine in engines:
            engine.fail_next()
        with pytest.raises(EngineError):
            await mesh.client().complete(asked())
        await mesh.client().complete(asked())
    (registry,) = mesh.coordinator_metrics

    def count(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"chorus_generation_{name}_total", labels)

    assert count("attempts", outcome="ENGINE_FAILED") == 2
    assert count("attempts", outcome="OK") == 1
    assert count("retries", reason="ENGINE_FAILED") == 1
    assert count("output_tokens", model="fake-1b") == len(SECRET) + 1
    assert registry.get_sample_value("chorus_generation_time_to_first_token_seconds_count", {"model": "fake-1b"}) == 1
    assert registry.get_sample_value("chorus_generation_inter_token_gap_seconds_count", {"model": "fake-1b"}) == len(
        SECRET
    )
    method = "chorus.api.coordinator.v1.Coordinator/Generate"
    ends = {"method": method, "code": "OK"}, {"method": method, "code": "UNAVAILABLE"}
    assert [registry.get_sample_value("chorus_rpc_requests_total", labels) for labels in ends] == [1, 1]
