"""The answer cache asks nobody whom the request itself may not go to, and keeps nothing that is to be forgotten."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from chorus.client import CacheOutcome, Fallback, MeshClient, chat_request
from chorus.config.remote import RemoteServer
from chorus.core.errors import NoCapableRunnerError
from chorus.core.generation import GenerationRequest, Requirements, StopConditions
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine, FakeModel, fake_artifact
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace
from tests.engine.upstream import Upstream, UpstreamModel
from tests.mesh.test_coordinator_cache import EXACT, QUESTION, SEMANTIC, outcome, raw
from tests.mesh.test_remote_runner import Elsewhere, Outside, engine_at


def _asks(**requirements: Any) -> GenerationRequest:
    return chat_request(QUESTION, model="local", temperature=0.0, requirements=Requirements(**requirements))


@pytest.mark.parametrize("server", [Outside, Elsewhere])
async def test_a_question_is_embedded_only_where_the_request_may_go(
    certificates: MeshCertificates, server: type[RemoteServer]
) -> None:
    embeds = UpstreamModel("text-embedding", ("embedding",))
    local = FakeEngine([FakeModel(fake_artifact("local.Q8_0.gguf", family="local"))])
    async with (
        asyncio.timeout(60),
        Upstream("vllm", embeds) as upstream,
        InProcessMesh(
            runners=[engine_at(upstream, server), local],
            certificates=certificates,
            cache={"embedding_model": "text-embedding"},
        ) as mesh,
    ):
        client = mesh.client()

        async def why(request: GenerationRequest, **fallback: bool) -> str:
            answer = await client.complete(request, cache=SEMANTIC, fallback=Fallback(**fallback))
            assert answer.cache is not None
            assert answer.cache.outcome is CacheOutcome.MISS
            return answer.cache.reason

        for external in (False, True):  # an allowance for what is not private says nothing of what is
            reason = await why(_asks(private=True), external=external)
            assert "may not be embedded" in reason
            assert ("paid provider" if server is Outside else "unencrypted") in reason
            await _forgotten(client)
        assert "may not be embedded" in await why(_asks(runner_ids=("runner-2",)), external=True)
        await _forgotten(client)
        if server is Outside:
            assert "paid provider" in await why(_asks())
            await _forgotten(client)

        def seen() -> list[Any]:
            return [body for body in upstream.asked("/v1/embeddings") if body["input"] == QUESTION]

        assert not seen()
        assert await why(_asks(), external=True) == ""
        assert len(seen()) == 1


async def test_who_may_not_ask_a_provider_reads_no_answer_that_one_is_just_giving(
    certificates: MeshCertificates,
) -> None:
    async with (
        asyncio.timeout(60),
        Upstream("vllm") as upstream,
        InProcessMesh(runners=[engine_at(upstream, Outside)], certificates=certificates) as mesh,
    ):
        upstream.pause_after = 2
        client, external = mesh.client(), Fallback(external=True)
        request = raw("Once upon a time", stop=StopConditions(max_tokens=8))
        private = raw("Once upon a time", stop=StopConditions(max_tokens=8), requirements=Requirements(private=True))
        first = asyncio.create_task(client.complete(request, cache=EXACT, fallback=external))
        while not mesh.coordinators[0]._answers._flights:
            await client.list_models()
        with pytest.raises(NoCapableRunnerError):
            await client.complete(request, cache=EXACT)
        with pytest.raises(NoCapableRunnerError):
            await client.complete(private, cache=EXACT, fallback=external)
        same = asyncio.create_task(client.complete(request, cache=EXACT, fallback=external))
        while sum(flight._readers for flight in mesh.coordinators[0]._answers._flights.values()) != 2:
            await client.list_models()
        upstream.go_on.set()
        assert {outcome(await first), outcome(await same)} == {CacheOutcome.MISS, CacheOutcome.JOINED}
        # A provider's answer is not kept: nobody vouches for which model it was.
        assert sum(held.entries for held in (await client.cache()).held.values()) == 0


@pytest.mark.parametrize("everybody", [False, True])
async def test_what_is_being_made_when_answers_are_forgotten_is_not_kept(
    certificates: MeshCertificates, everybody: bool
) -> None:
    pace = ManualPace()
    async with (
        asyncio.timeout(60),
        InProcessMesh(runners=[FakeEngine(pace=pace)], certificates=certificates) as mesh,
    ):
        ann, bob = mesh.client(name="ann"), mesh.client(name="bob")
        admin = mesh.client(role=Role.ADMIN, name="root")
        running = [asyncio.create_task(client.complete(raw("echo:yes"), cache=EXACT)) for client in (ann, bob)]
        await pace.waiting(2)
        await (admin.clear_cache(everybody=True) if everybody else ann.clear_cache())
        pace.release_all()
        assert [(await answer).text for answer in running] == ["yes", "yes"]
        flights = mesh.coordinators[0]._answers._flights
        while flights:  # until what is kept is kept
            await admin.list_models()
        assert outcome(await ann.complete(raw("echo:yes"), cache=EXACT)) is CacheOutcome.MISS
        expected = CacheOutcome.MISS if everybody else CacheOutcome.EXACT
        assert outcome(await bob.complete(raw("echo:yes"), cache=EXACT)) is expected


async def _forgotten(client: MeshClient) -> None:
    """Waits until the answer is kept, and forgets it: the next one is to be a miss, too."""
    while not sum((await client.clear_cache()).values()):
        pass
