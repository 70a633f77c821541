"""A member's node is killed in the middle of an ensemble: the stream goes on, and the verdict says what happened."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from chorus.client import EnsembleEvent, EnsembleGeneration, MemberEvent, Verdict, ensemble_spec
from chorus.core.ensemble.records import MemberState
from chorus.core.generation import Finished, GenerationRequest, TextPrompt, TokenDelta
from chorus.testing.certificates import MeshCertificates
from chorus.testing.mesh import InProcessMesh
from chorus.testing.service import FAMILY_ENV, TOKENS_PER_SECOND_ENV
from tests.mesh.test_coordinator_lost_process import LASTING, Processes

ASKED = GenerationRequest(model="", prompt=TextPrompt("which?"))


def tokens(events: list[EnsembleEvent], member_id: str) -> list[int]:
    return [
        token
        for event in events
        if isinstance(event, MemberEvent) and event.member_id == member_id and isinstance(event.event, TokenDelta)
        for token in event.event.token_ids
    ]


async def until_all_speak(events: EnsembleGeneration, *names: str) -> list[EnsembleEvent]:
    seen: list[EnsembleEvent] = []
    while not all(len(tokens(seen, name)) > 2 for name in names):
        seen.append(await anext(events))
    return seen


async def test_a_member_whose_node_is_killed(
    certificates: MeshCertificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKENS_PER_SECOND_ENV, "25")
    async with (
        # Nobody else has that model, so that waiting for another one is in vain.
        InProcessMesh(
            runners=0, certificates=certificates, registry=LASTING, coordinator={"resume_wait_s": 0.5}
        ) as mesh,
        AsyncExitStack() as stack,
    ):
        processes = Processes(mesh, tmp_path, stack)
        for name in ("alpha", "beta"):
            await processes.runner(name)
        monkeypatch.setenv(FAMILY_ENV, "lonely")
        await processes.runner("gamma")
        spec = ensemble_spec("vote", ("fake-1b*2", "lonely"), quorum=3)  # two who agree would settle it
        async with mesh.client().ensemble(ASKED, spec) as events:
            seen = await until_all_speak(events, "fake-1b-1", "fake-1b-2", "lonely")
            processes.runners["gamma"].signal(signal.SIGKILL)
            seen += [event async for event in events]
        assert isinstance(seen[-1], Finished)
        (verdict,) = [event for event in seen if isinstance(event, Verdict)]
        assert [(outcome.member_id, outcome.state, outcome.reason) for outcome in verdict.members] == [
            ("fake-1b-1", MemberState.ANSWERED, ""),
            ("fake-1b-2", MemberState.ANSWERED, ""),
            ("lonely", MemberState.FAILED, "UNAVAILABLE"),
        ]
        assert verdict.members[2].runner_id == "gamma", "where it was lost"
        assert (verdict.agreement, verdict.answered_by.startswith("fake-1b")) == (1.0, True)
        whole = tokens(seen, "fake-1b-1")
        assert len(whole) == len(set(whole)) == 65, "none was lost or doubled"
        assert tokens(seen, "fake-1b-2") == whole

        # A member that somebody else can go on with is not lost.
        async with mesh.client().ensemble(ASKED, ensemble_spec("vote", ("fake-1b*2",))) as events:
            seen = await until_all_speak(events, "fake-1b-1", "fake-1b-2")
            processes.runners["alpha"].signal(signal.SIGKILL)
            seen += [event async for event in events]
        (verdict,) = [event for event in seen if isinstance(event, Verdict)]
        assert [(outcome.state, outcome.runner_id) for outcome in verdict.members] == [
            (MemberState.ANSWERED, "beta"),
            (MemberState.ANSWERED, "beta"),
        ]
        assert tokens(seen, "fake-1b-1") == tokens(seen, "fake-1b-2") == whole
