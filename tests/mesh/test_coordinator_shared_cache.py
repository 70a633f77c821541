"""An answer cache that two coordinators share in a real Valkey or Redis, through a mesh."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from chorus.api.coordinator.v1 import cache_pb2
from chorus.client import CacheOutcome, Fallback, MeshClient
from chorus.config import ChorusConfig
from chorus.coordinator.service import CoordinatorService
from chorus.core.errors import ConfigError, RunnersUnavailableError, UnavailableError
from chorus.core.generation import Requirements
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine, FakeModel, fake_artifact
from chorus.testing.mesh import InProcessMesh
from tests.mesh.test_coordinator_cache import EXACT, QUESTION, SEMANTIC, WordsEngine, outcome, raw
from tests.store.valkey_server import ValkeyServer, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    yield from running(tmp_path_factory.mktemp("valkey"))


def _shared(server: ValkeyServer, certificates: MeshCertificates, prefix: str, **settings: Any) -> InProcessMesh:
    return InProcessMesh(
        coordinators=2,
        certificates=certificates,
        cache={"store": "valkey", "mode": "exact"},
        valkey={"url_file": server.url_file, "prefix": prefix},
        **settings,
    )


async def _kept(client: MeshClient, count: int) -> None:
    """Waits until so many answers are kept; each coordinator tells of all of them."""
    while any(held.entries < count for held in (await client.cache()).held.values()):
        pass


async def test_what_one_coordinator_was_told_another_one_gives_again(
    certificates: MeshCertificates, server: ValkeyServer
) -> None:
    async with asyncio.timeout(60), _shared(server, certificates, "told:", runners=[WordsEngine()]) as mesh:
        one, other = mesh.client(coordinators=[0]), mesh.client(coordinators=[1])
        stranger = mesh.client(name="client-2", coordinators=[1])
        first = await one.complete(QUESTION, temperature=0.0, cache=SEMANTIC)
        assert outcome(first) is CacheOutcome.MISS
        await _kept(one, 1)
        again = await other.complete(QUESTION, temperature=0.0, cache=EXACT)
        assert (outcome(again), again.choices) == (CacheOutcome.EXACT, first.choices)
        near = [
            await other.complete(question, temperature=0.0, cache=SEMANTIC)
            for question in (
                "What's the capital of France?",
                "Tell me the capital of France.",
                "Is France the capital?",
            )
        ]
        assert CacheOutcome.SEMANTIC in {outcome(answer) for answer in near[:2]}  # one may be explored
        assert outcome(near[2]) is CacheOutcome.MISS
        assert outcome(await stranger.complete(QUESTION, temperature=0.0, cache=SEMANTIC)) is CacheOutcome.MISS
        await _kept(mesh.client(role=Role.ADMIN, name="root", coordinators=[0]), 3)
        assert sum((await other.clear_cache()).values()) >= 2
        assert outcome(await one.complete(QUESTION, temperature=0.0, cache=EXACT)) is CacheOutcome.MISS


async def test_a_private_request_leaves_nothing_in_the_shared_store(
    certificates: MeshCertificates, server: ValkeyServer
) -> None:
    private = raw("a secret", requirements=Requirements(private=True))
    async with asyncio.timeout(60), _shared(server, certificates, "secret:", runners=[WordsEngine()]) as mesh:
        client, fallback = mesh.client(coordinators=[0]), Fallback(cached_answer=True)
        for _ in range(2):
            answer = await client.complete(private, cache=SEMANTIC)
            assert outcome(answer) is CacheOutcome.BYPASSED
            assert answer.cache is not None
            assert "private" in answer.cache.reason
        assert (await client.complete(private)).cache is None  # of one that says nothing nothing is said
        assert sum(held.entries for held in (await client.cache()).held.values()) == 0
        # Nor is it asked there for an answer: that to the same request, not marked so, would be an old one to give.
        public = raw("a secret")
        await client.complete(public, cache=EXACT)
        await _kept(client, 1)
        await mesh.runners[0].stop(0.0)
        await mesh.until(lambda directory: not directory.entries, coordinator=0)
        old = await client.complete(public, cache=EXACT, fallback=fallback)
        assert outcome(old) is CacheOutcome.STALE
        with pytest.raises(RunnersUnavailableError):
            await client.complete(private, cache=EXACT, fallback=fallback)


@pytest.mark.parametrize("shared", [False, True])
async def test_forgetting_tells_whose_answers_are_forgotten(
    certificates: MeshCertificates, server: ValkeyServer, shared: bool
) -> None:
    mesh = (
        _shared(server, certificates, "whose:") if shared else InProcessMesh(coordinators=2, certificates=certificates)
    )
    async with asyncio.timeout(60), mesh:
        clients = [mesh.client(coordinators=[number]) for number in range(2)]
        for client in clients:
            await client.complete(raw("hi"), cache=EXACT)
        for client in clients:
            await _kept(client, 1)
        told: list[cache_pb2.ClearCacheResponse] = [
            await client._coordinators.single("ClearCache", cache_pb2.ClearCacheRequest()) for client in clients
        ]
    # Each forgets its own, or the first one those of both.
    assert [(answer.shared_store, answer.forgotten_count) for answer in told] == (
        [(True, 1), (True, 0)] if shared else [(False, 1), (False, 1)]
    )


async def test_another_file_under_the_models_name_has_no_shared_answer(
    certificates: MeshCertificates, server: ValkeyServer
) -> None:
    async with asyncio.timeout(60), _shared(server, certificates, "file:") as mesh:
        one, other = mesh.client(coordinators=[0]), mesh.client(coordinators=[1])
        await one.complete(raw("hi"), model="fake-1b", cache=EXACT)
        await _kept(one, 1)
        assert outcome(await other.complete(raw("hi"), model="fake-1b", cache=EXACT)) is CacheOutcome.EXACT
        model = FakeModel(fake_artifact("fake-1b.Q4_0.gguf", family="fake-1b"))
        await mesh.add_runner(FakeEngine([model]), name="runner-2")
        await mesh.runners[0].stop(0.0)
        await mesh.until(lambda directory: set(directory.entries) == {"runner-2"}, coordinator=1)
        assert outcome(await other.complete(raw("hi"), model="fake-1b", cache=EXACT)) is CacheOutcome.MISS


async def test_without_the_server_every_request_is_answered_and_none_has_an_old_answer(
    certificates: MeshCertificates, server: ValkeyServer
) -> None:
    async with asyncio.timeout(60), _shared(server, certificates, "away:", runners=[WordsEngine()]) as mesh:
        client = mesh.client(coordinators=[0])
        await client.complete(QUESTION, temperature=0.0, cache=SEMANTIC)
        await _kept(client, 1)
        server.kill()
        try:
            for cache in (EXACT, SEMANTIC, SEMANTIC, None):
                answer = await client.complete(QUESTION, temperature=0.0, cache=cache)
                assert answer.text
                assert answer.cache is None or outcome(answer) is CacheOutcome.MISS
            assert [held.entries for held in (await client.cache()).held.values()] == [0]
            with pytest.raises(UnavailableError, match="not forgotten"):
                await client.clear_cache()
        finally:
            server.start()


def test_a_store_of_which_nothing_is_said_is_refused() -> None:
    async def build() -> None:
        CoordinatorService(ChorusConfig.model_validate({"cache": {"store": "valkey"}}), identity=None)

    with pytest.raises(ConfigError, match=r"valkey\.url_file"):
        asyncio.run(build())
