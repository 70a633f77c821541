"""Where a running coordinator sends what it has sent before, and whom it is configured to ask less."""

from __future__ import annotations

import pytest

from chorus.core.generation import GenerationRequest, Requirements, TextPrompt
from chorus.testing.certificates import MeshCertificates
from chorus.testing.mesh import InProcessMesh

LONG = "x" * 3000


def asked(text: str, *runner_ids: str, session_id: str = "") -> GenerationRequest:
    return GenerationRequest(
        "", TextPrompt(text), requirements=Requirements(runner_ids=runner_ids), session_id=session_id
    )


async def prefills(mesh: InProcessMesh, request: GenerationRequest) -> dict[str, float]:
    """What reading the prompt would cost on each runner, in seconds."""
    explanation = await mesh.client().explain_placement(request)
    return {candidate.runner_id: candidate.terms.get("prefill", 0.0) for candidate in explanation.candidates}


async def test_a_conversation_goes_on_where_it_was(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=3, certificates=certificates) as mesh:
        prompt = f"{LONG}\necho:hello"
        before = await prefills(mesh, asked(prompt))
        assert len(set(before.values())) == 1
        await mesh.client().complete(asked(prompt, "runner-2"))
        after = await prefills(mesh, asked(f"{prompt} and more"))
        assert after["runner-2"] < before["runner-2"] / 4
        assert after["runner-1"] >= before["runner-1"]
        assert (await mesh.client().explain_placement(asked(prompt))).chosen_runner_id == "runner-2"


async def test_a_session_is_known_by_its_name(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=3, certificates=certificates) as mesh:
        await mesh.client().complete(asked("echo:hello, how are you?", "runner-3", session_id="mine"))
        mine = await prefills(mesh, asked("echo:hello, how are you?", session_id="mine"))
        assert mine.pop("runner-3") == 0.0
        assert all(mine.values())
        assert all((await prefills(mesh, asked("echo:hello, how are you?"))).values())


async def test_another_process_has_to_read_it_again(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=2, certificates=certificates) as mesh:
        prompt = f"{LONG}\necho:hello"
        await mesh.client().complete(asked(prompt, "runner-2"))
        await mesh.runners.pop().stop(0.0)
        await mesh.until(lambda directory: "runner-2" not in directory.entries)
        await mesh.add_runner(name="runner-2")
        await mesh.until(
            lambda directory: (
                "runner-2" in directory.entries
                and directory.entries["runner-2"].reachable
                and directory.entries["runner-2"].record.state == "ready"
            )
        )
        costs = await prefills(mesh, asked(prompt))
        assert costs["runner-1"] == costs["runner-2"] > 0


async def test_a_runner_may_be_configured_to_be_asked_less(certificates: MeshCertificates) -> None:
    settings = {"runner_weights": "runner-1=0.1"}
    async with InProcessMesh(runners=2, certificates=certificates, coordinator=settings) as mesh:
        explanation = await mesh.client().explain_placement(asked("echo:hello"))
        costs = {candidate.runner_id: candidate.cost for candidate in explanation.candidates}
        assert costs["runner-1"] == pytest.approx(10 * costs["runner-2"])
        answers = [await mesh.client().complete(asked("echo:hello")) for _ in range(5)]
        assert {answer.runner_id for answer in answers} == {"runner-2"}
