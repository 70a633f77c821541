"""The answer cache of a running mesh: hits that are whole streams, one run for many, questions that mean the same."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np
import pytest

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.client import (
    CacheMode,
    CacheOutcome,
    CacheReport,
    Completion,
    Fallback,
    MeshClient,
    StartedAt,
    chat_request,
    ensemble_spec,
)
from chorus.core.errors import EngineError, InvalidRequestError, PermissionDeniedError, RunnersUnavailableError
from chorus.core.fleet.records import Artifact
from chorus.core.generation import (
    Embedding,
    EmbeddingRequest,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Priority,
    Queued,
    Sampling,
    TextPrompt,
    TokenDelta,
    Tool,
)
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine, FakeModel, fake_artifact
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace
from chorus.wire.cache import encode_policy
from chorus.wire.generation import encode_generation

EXACT, SEMANTIC = CacheMode.EXACT, CacheMode.SEMANTIC
QUESTION = "What is the capital of France?"


class WordsEngine(FakeEngine):
    """Its vectors are near where texts have words in common, as those of a model are."""

    async def embed(self, request: EmbeddingRequest) -> tuple[Artifact, Sequence[Embedding]]:
        artifact, _ = await super().embed(request)
        return artifact, [Embedding(_vector(str(text)), 1) for text in request.inputs]


class Held(WordsEngine):
    """Its vectors come once they may."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.may = asyncio.Event(), asyncio.Event()

    async def embed(self, request: EmbeddingRequest) -> tuple[Artifact, Sequence[Embedding]]:
        self.asked.set()
        await self.may.wait()
        return await super().embed(request)


class Unlucky(FakeEngine):
    """Its first generation fails once it is told to, before anything was said."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.fails = asyncio.Event(), asyncio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        if not self.asked.is_set():
            self.asked.set()
            await self.fails.wait()
            raise EngineError("unlucky")
        async for event in super().generate(request):
            yield event


def _vector(text: str) -> tuple[float, ...]:
    vector = np.full(384, 0.05)
    for word in text.lower().split():
        seed = int.from_bytes(hashlib.sha256(word.strip("?.!,").encode()).digest()[:4], "big")
        vector += 0.02 * np.random.default_rng(seed).normal(size=384)
    return tuple((vector / np.linalg.norm(vector)).tolist())


def raw(text: str, **more: Any) -> GenerationRequest:
    return GenerationRequest("", TextPrompt(text), sampling=Sampling(temperature=0.0), **more)


def outcome(answer: Completion) -> CacheOutcome:
    assert answer.cache is not None
    return answer.cache.outcome


async def kept(client: MeshClient, count: int) -> None:
    """Waits until so many answers are kept: that goes on when the stream has ended already."""
    while sum(held.entries for held in (await client.cache()).held.values()) < count:
        pass


async def test_the_very_same_request_gets_the_very_same_stream_again(certificates: MeshCertificates) -> None:
    async with (
        asyncio.timeout(60),
        InProcessMesh(certificates=certificates, cache={"mode": "exact"}) as mesh,
    ):
        client, other = mesh.client(), mesh.client(name="client-2")
        request = raw("a story", logprobs=1)
        first = await client.complete(request, cache=EXACT)
        assert outcome(first) is CacheOutcome.MISS
        await kept(client, 1)
        events: list[Any] = []
        async with client.generate(request, cache=EXACT) as generation:
            events.extend([event async for event in generation])
        report, started, *deltas, finished = events
        assert isinstance(report, CacheReport)
        assert report.outcome is CacheOutcome.EXACT
        assert report.age_s is not None
        assert isinstance(started, StartedAt)
        assert started.origin.request_id not in ("", first.request_id)
        assert all(isinstance(delta, TokenDelta) for delta in deltas)
        assert len(deltas) > 1  # in pieces, so that a client may stop, and go on elsewhere
        assert [delta.index for delta in deltas] == [
            sum(len(delta.token_ids) for delta in deltas[:place]) for place in range(len(deltas))
        ]
        assert tuple(token for delta in deltas for token in delta.token_ids) == first.choices[0].token_ids
        assert "".join(delta.text for delta in deltas) == first.text
        assert sum(len(delta.logprobs) for delta in deltas) == len(first.choices[0].token_ids)
        assert isinstance(finished, Finished)
        assert finished.usage == first.usage
        # A greedy request that says nothing has it as configured, and its stream says so.
        silent = await client.complete(request)
        assert (outcome(silent), silent.text) == (CacheOutcome.EXACT, first.text)
        # Nobody else has it, and any other setting is another request.
        assert outcome(await other.complete(request, cache=EXACT)) is CacheOutcome.MISS
        assert outcome(await client.complete(request, cache=EXACT, max_tokens=3)) is CacheOutcome.MISS
        held = next(iter((await client.cache()).held.values()))
        assert (held.exact_hits, held.misses) == (2, 3)
        assert held.saved_tokens == 2 * first.usage.completion_tokens
        sample = mesh.coordinator_metrics[0].get_sample_value
        assert sample("chorus_cache_requests_total", {"outcome": "exact"}) == 2


async def test_a_hit_comes_in_one_message_to_who_reads_that_and_event_by_event_to_others(
    certificates: MeshCertificates,
) -> None:
    async with asyncio.timeout(60), InProcessMesh(certificates=certificates) as mesh:
        client = mesh.client()
        request = GenerationRequest("", TextPrompt("a story"), sampling=Sampling(temperature=0.0), logprobs=1)
        first = await client.complete(request, cache=EXACT, max_tokens=40)
        await kept(client, 1)
        message = coordinator_pb2.GenerateRequest(
            spec=encode_generation(chat_request(request, max_tokens=40)), cache=encode_policy(EXACT)
        )
        (whole,) = [one async for one in client._coordinators.stream("Generate", message)]
        message.cache.reads_more = False
        apart = [one async for one in client._coordinators.stream("Generate", message)]
        assert [one.HasField("cache") for one in apart] == [True] + [False] * (len(apart) - 1)
        kinds = [event.WhichOneof("event") for event in (whole.event, *whole.more)]
        assert kinds == [one.event.WhichOneof("event") for one in apart[1:]]
        assert (kinds[0], kinds[-1], whole.cache.outcome) == ("started", "finished", apart[0].cache.outcome)
        again = await client.complete(request, cache=EXACT, max_tokens=40)
        assert (again.choices, again.usage) == (first.choices, first.usage)


async def test_a_caller_forgets_its_own_and_an_admin_everybodys(certificates: MeshCertificates) -> None:
    async with asyncio.timeout(60), InProcessMesh(certificates=certificates) as mesh:
        ann, bob = mesh.client(name="ann"), mesh.client(name="bob")
        admin = mesh.client(role=Role.ADMIN, name="root")
        for client in (ann, bob):
            await client.complete(raw("hi"), cache=EXACT)
        await kept(admin, 2)
        with pytest.raises(PermissionDeniedError, match="admin"):
            await ann.clear_cache(everybody=True)
        assert sum((await ann.clear_cache()).values()) == 1
        assert outcome(await bob.complete(raw("hi"), cache=EXACT)) is CacheOutcome.EXACT
        assert sum((await admin.clear_cache(everybody=True)).values()) == 1


@pytest.mark.parametrize("cache", [EXACT, SEMANTIC])
async def test_what_a_full_context_cut_off_is_not_kept(certificates: MeshCertificates, cache: CacheMode) -> None:
    engine = WordsEngine([FakeModel(context_length=64)])
    async with asyncio.timeout(60), InProcessMesh(runners=[engine], certificates=certificates) as mesh:
        client, request = mesh.client(), chat_request("echo:" + "word " * 8, temperature=0.0)
        cut = await client.complete(request, cache=cache)
        assert [choice.reason for choice in cut.choices] == [FinishReason.CONTEXT_FULL]
        short = await client.complete(request, cache=cache, max_tokens=3)
        assert [choice.reason for choice in short.choices] == [FinishReason.LENGTH]
        await kept(client, 1)
        assert outcome(await client.complete(request, cache=cache, max_tokens=3)) is CacheOutcome.EXACT
        assert outcome(await client.complete(request, cache=cache)) is CacheOutcome.MISS


async def test_what_may_not_be_given_again_is_said_and_made(certificates: MeshCertificates) -> None:
    acting = Tool("pay", "Pays.", {"type": "object"}, acts=True)
    async with asyncio.timeout(60), InProcessMesh(certificates=certificates) as mesh:
        client = mesh.client()
        for _ in range(2):
            answer = await client.complete(
                GenerationRequest("", raw("").prompt, sampling=Sampling(seed=1)), cache=CacheMode.OFF
            )
            assert answer.cache is None
        # What draws is no reason not to, where it is asked for.
        drawn = GenerationRequest("", TextPrompt("hm"))
        texts = []
        for expected in (CacheOutcome.MISS, CacheOutcome.EXACT):
            answer = await client.complete(drawn, cache=EXACT)
            texts.append(answer.text)
            assert outcome(answer) is expected
            await kept(client, 1)
        assert texts[0] == texts[1]
        request = chat_request("pay")
        with_tool = GenerationRequest("", request.prompt, tools=(acting,))
        for _ in range(2):
            answer = await client.complete(with_tool, cache=EXACT)
            assert outcome(answer) is CacheOutcome.BYPASSED
            assert answer.cache is not None
            assert "act" in answer.cache.reason


async def test_identical_requests_are_run_once_and_outlive_who_came_first(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    engine = FakeEngine(pace=pace)
    async with asyncio.timeout(60), InProcessMesh(runners=[engine], certificates=certificates) as mesh:
        client = mesh.client()
        leader = client.generate(raw("echo:one two three"), cache=EXACT)
        report = await anext(leader)
        assert isinstance(report, CacheReport)
        assert report.outcome is CacheOutcome.MISS
        reading = asyncio.create_task(_next_delta(leader))
        await pace.waiting(1)
        pace.release()
        await reading
        followers = [asyncio.create_task(client.complete(raw("echo:one two three"), cache=EXACT)) for _ in range(3)]
        await _has_readers(mesh, 4)
        await leader.aclose()  # the one who began it goes away
        await _has_readers(mesh, 3)
        pace.release_all()
        answers = await asyncio.gather(*followers)
        assert {outcome(answer) for answer in answers} == {CacheOutcome.JOINED}
        assert {answer.text for answer in answers} == {"one two three"}
        assert len({answer.request_id for answer in answers}) == 3
        stats = (await client.stats()).report.total
        assert stats.completed == 1


async def test_an_answer_that_is_just_being_stored_is_not_made_again(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    engine = FakeEngine(pace=pace)
    async with asyncio.timeout(60), InProcessMesh(runners=[engine], certificates=certificates) as mesh:
        client, goes_on = mesh.client(), threading.Event()
        leader = asyncio.create_task(client.complete(raw("echo:one two"), cache=EXACT))
        await pace.waiting(1)
        # Until then nothing is stored or found.
        holds = mesh.coordinators[0]._answers._store._thread._thread.submit(goes_on.wait)
        try:
            pace.release_all()
            answer = await leader
            joined = await client.complete(raw("echo:one two"), cache=EXACT, timeout_s=1000.0)
            assert not holds.done()
        finally:
            goes_on.set()
        assert outcome(joined) is CacheOutcome.JOINED
        assert joined.text == answer.text == "one two"
        await kept(client, 1)
        assert outcome(await client.complete(raw("echo:one two"), cache=EXACT)) is CacheOutcome.EXACT
        assert (await client.stats()).report.total.completed == 1


async def test_an_answer_that_was_stored_while_a_question_was_compared_is_not_made_again(
    certificates: MeshCertificates,
) -> None:
    engine = Held()
    async with asyncio.timeout(60), InProcessMesh(runners=[engine], certificates=certificates) as mesh:
        client = mesh.client()
        comparing = asyncio.create_task(client.complete(QUESTION, temperature=0.0, cache=SEMANTIC))
        await engine.asked.wait()
        other = await client.complete(QUESTION, temperature=0.0, cache=EXACT)
        assert outcome(other) is CacheOutcome.MISS
        await kept(client, 1)
        engine.may.set()
        answer = await comparing
        assert outcome(answer) is CacheOutcome.EXACT
        assert answer.text == other.text


async def test_a_cached_run_waits_for_a_place_no_longer_than_its_caller(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with (
        asyncio.timeout(60),
        InProcessMesh(
            runners=[FakeEngine(pace=pace)], certificates=certificates, coordinator={"max_requests": 1}
        ) as mesh,
    ):
        client = mesh.client()
        first = asyncio.create_task(client.complete(raw("first")))
        await pace.waiting(1)
        waiting = client.generate(raw("second"), cache=EXACT, timeout_s=1000.0)
        while not isinstance(await anext(waiting), Queued):
            pass
        queues = mesh.coordinators[0]._admission._queue._queues
        (ticket,) = queues[Priority.INTERACTIVE].tickets.values()
        assert ticket.deadline is not None
        left_s = ticket.deadline - asyncio.get_running_loop().time()
        assert left_s < 1100.0  # a client gives a coordinator a little more, for its word to arrive
        pace.release_all()
        await first
        assert (await waiting.completion()).text


async def test_an_ensemble_is_not_kept_and_says_so(certificates: MeshCertificates) -> None:
    async with asyncio.timeout(60), InProcessMesh(certificates=certificates, cache={"mode": "exact"}) as mesh:
        client, ensemble = mesh.client(), ensemble_spec("vote")
        with pytest.raises(InvalidRequestError, match="not kept"):
            await client.complete(raw("echo:yes"), ensemble=ensemble, cache=EXACT)
        # One that asks for none has none, whatever is configured for those that say nothing.
        for cache in (None, CacheMode.OFF):
            answer = await client.complete(raw("echo:yes"), ensemble=ensemble, cache=cache)
            assert (answer.text, answer.cache) == ("yes", None)
        assert sum(held.entries for held in (await client.cache()).held.values()) == 0


async def test_a_run_that_fails_is_no_word_on_a_followers_own(certificates: MeshCertificates) -> None:
    settings, engine = {"max_attempts": 1}, Unlucky()
    async with (
        asyncio.timeout(60),
        InProcessMesh(runners=[engine], certificates=certificates, coordinator=settings) as mesh,
    ):
        client = mesh.client()
        leader = asyncio.create_task(client.complete(raw("echo:yes"), cache=EXACT))
        await engine.asked.wait()
        follower = asyncio.create_task(client.complete(raw("echo:yes"), cache=EXACT))
        await _has_readers(mesh, 2)
        engine.fails.set()
        with pytest.raises(EngineError):
            await leader
        assert (await follower).text == "yes"


async def test_nobody_left_who_reads_ends_the_run(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    engine = FakeEngine(pace=pace)
    async with asyncio.timeout(60), InProcessMesh(runners=[engine], certificates=certificates) as mesh:
        client = mesh.client()
        generation = client.generate(raw("echo:never"), cache=EXACT)
        await anext(generation)
        reading = asyncio.create_task(_next_delta(generation))
        await pace.waiting(1)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await generation.aclose()
        await _has_readers(mesh, 0)
        while any(load.slots_used for load in engine.load_report()):
            await client.list_models()


async def test_an_old_answer_where_nobody_is_left_and_none_of_another_model(certificates: MeshCertificates) -> None:
    async with (
        asyncio.timeout(60),
        InProcessMesh(certificates=certificates, cache={"ttl_s": 3600.0}) as mesh,
    ):
        client, fallback = mesh.client(), Fallback(cached_answer=True)
        first = await client.complete(raw("hi"), model="fake-1b", cache=EXACT)
        await kept(client, 1)
        # Another file goes by the model's name now.
        await mesh.add_runner(
            FakeEngine([FakeModel(fake_artifact("fake-1b.Q4_0.gguf", family="fake-1b"))]), name="runner-2"
        )
        await mesh.until(lambda directory: directory.get("runner-2") is not None)
        await mesh.runners[0].stop(0.0)
        await mesh.until(lambda directory: directory.get("runner-1") is None)
        assert outcome(await client.complete(raw("hi"), model="fake-1b", cache=EXACT)) is CacheOutcome.MISS
        await kept(client, 2)
        await mesh.runners[1].stop(0.0)
        await mesh.until(lambda directory: not directory.entries)
        with pytest.raises(RunnersUnavailableError):
            await client.complete(raw("hi"), model="fake-1b")
        old = await client.complete(raw("hi"), model="fake-1b", fallback=fallback)
        assert outcome(old) is CacheOutcome.STALE
        assert old.text
        with pytest.raises(RunnersUnavailableError):
            await client.complete(raw("never asked"), model="fake-1b", fallback=fallback)
        assert first.artifact_sha256 != old.artifact_sha256


async def test_a_question_that_means_the_same_and_none_that_looks_alike(certificates: MeshCertificates) -> None:
    async with asyncio.timeout(60), InProcessMesh(runners=[WordsEngine()], certificates=certificates) as mesh:
        client = mesh.client()
        first = await client.complete(QUESTION, temperature=0.0, cache=SEMANTIC)
        assert outcome(first) is CacheOutcome.MISS
        await kept(client, 1)
        again = [
            await client.complete(question, temperature=0.0, cache=SEMANTIC)
            for question in (
                "What's the capital of France?",
                "Tell me the capital of France.",
                "Please tell me what the capital of France is.",
                "Hello, what is France's capital?",
            )
        ]
        # A few are generated anyway, to compare.
        assert {outcome(answer) for answer in again} <= {CacheOutcome.SEMANTIC, CacheOutcome.MISS}
        hit = next(answer for answer in again if outcome(answer) is CacheOutcome.SEMANTIC)
        assert hit.choices == first.choices
        assert hit.cache is not None
        assert hit.cache.question == QUESTION
        assert 0.7 < hit.cache.similarity <= 1.0
        assert hit.cache.confidence > 0.8
        for question in ("What is the capital of Greece?", "Where is the capital of France?", "Is France the capital?"):
            assert outcome(await client.complete(question, temperature=0.0, cache=SEMANTIC)) is CacheOutcome.MISS
        # Other settings, another conversation: another question.
        other = await client.complete(QUESTION, temperature=0.0, instructions="Be brief.", cache=SEMANTIC)
        assert outcome(other) is CacheOutcome.MISS


async def test_with_no_budget_for_wrong_answers_each_hit_is_checked(certificates: MeshCertificates) -> None:
    async with (
        asyncio.timeout(60),
        InProcessMesh(runners=[WordsEngine()], certificates=certificates, cache={"wrong_share": 1e-12}) as mesh,
    ):
        client = mesh.client()
        await client.complete(QUESTION, cache=SEMANTIC)
        await kept(client, 1)
        answer = await client.complete("What's the capital of France?", cache=SEMANTIC)
        assert outcome(answer) is CacheOutcome.MISS
        await kept(client, 2)
        held = next(iter((await client.cache()).held.values()))
        assert (held.explored, held.semantic_hits) == (1, 0)


async def test_without_an_embedding_model_it_is_exact_alone_and_says_so(certificates: MeshCertificates) -> None:
    from chorus.core.fleet.records import Feature
    from chorus.testing.fake_model import FAKE_FEATURES

    engine = FakeEngine([FakeModel(features=FAKE_FEATURES - {Feature.EMBED})])
    async with asyncio.timeout(60), InProcessMesh(runners=[engine], certificates=certificates) as mesh:
        client = mesh.client()
        answer = await client.complete(QUESTION, cache=SEMANTIC)
        assert answer.cache is not None
        assert "no embedding model" in answer.cache.reason
        await kept(client, 1)
        assert outcome(await client.complete(QUESTION, cache=SEMANTIC)) is CacheOutcome.EXACT
        (held,) = (await client.cache()).held.values()
        assert "no embedding model" in held.semantic_problem


async def test_a_mode_of_a_later_version_is_refused(certificates: MeshCertificates) -> None:
    async with asyncio.timeout(60), InProcessMesh(certificates=certificates) as mesh:
        policy = coordinator_pb2.CachePolicy(mode=77)  # type: ignore[arg-type]
        request = coordinator_pb2.GenerateRequest(cache=policy)
        with pytest.raises(InvalidRequestError, match="77"):
            async for _ in mesh.client()._coordinators.stream("Generate", request):
                pass


async def _next_delta(generation: Any) -> TokenDelta:
    async for event in generation:
        if isinstance(event, TokenDelta):
            return event
    raise AssertionError("the stream ended")


async def _has_readers(mesh: InProcessMesh, count: int) -> None:
    """Waits until so many read runs under way; nobody outside can see that."""
    client, flights = mesh.client(name="watcher"), mesh.coordinators[0]._answers._flights
    while sum(flight._readers for flight in flights.values()) != count:
        await client.list_models()
