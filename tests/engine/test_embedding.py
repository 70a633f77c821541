"""Vectors and scores of real models, held against numpy; batches, turns, cuts and failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from chorus.core.batching.texts import Piece
from chorus.core.errors import (
    DrainingError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    UnsupportedFeatureError,
)
from chorus.core.fleet.records import Feature
from chorus.core.generation import (
    EmbeddingRequest,
    GenerationRequest,
    Priority,
    RerankRequest,
    StopConditions,
    TextPrompt,
    TokenDelta,
)
from chorus.engine.llama import LlamaEngine, LlamaSettings, binding
from chorus.engine.llama.context import Context
from chorus.engine.llama.embedder import Embedder
from chorus.testing.engine_conformance import CHECKS, Check, needed_by
from chorus.testing.engine_subject import Subject, hear
from tests.engine import bert
from tests.engine.bert import Array
from tests.engine.conftest import smollm2
from tests.engine.minilm import minilm, reranker, score

pytestmark = pytest.mark.asyncio(loop_scope="session")
SETTINGS = LlamaSettings(slots=2, context_length=512, max_queue=2, threads=1, prefill_tokens=64)
VECTORS, SCORES = "all-minilm-l6-v2", "minilm-reranker"
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "don't, can't; e-mail: x@y.z costs $5 `code` {a: [1]}",
    "Émigré, naïve, façade: “quotes” & an ellipsis…",
    "e\u0301migre\u0301 in pieces, a\u200bzero\u00adwidth",
    "Привет, мир! İstanbul ŞIŞLI ﬁ ½ ①",
    "สวัสดีชาวโลก",
    "こんにちは世界 和漢",
    "한국어 텍스트",
    "हिन्दी में लिखा",
    "שלום عليكم",
    "🙂👩‍🚀!!!",
    "a",
    "",
    " \n\t",
    "word " * 250,
    "supercalifragilistic expialidocious " * 9,
)
DOCUMENTS = tuple(text for text in TEXTS if text.strip())


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def small(request: pytest.FixtureRequest) -> AsyncIterator[LlamaEngine]:
    """An engine with all-MiniLM-L6-v2 and a reranker made of it; two requests may wait."""
    cache = request.config.cache
    assert cache is not None
    engine = LlamaEngine([minilm(cache), reranker(cache)], SETTINGS)
    await engine.start()
    await engine.load(VECTORS)
    yield engine
    await engine.stop()


def ask(*texts: str | tuple[int, ...], **changes: object) -> EmbeddingRequest:
    return EmbeddingRequest(VECTORS, texts, **changes)  # type: ignore[arg-type]


def cosine(one: Sequence[float] | Array, other: Sequence[float] | Array) -> float:
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


# --- the numbers ----------------------------------------------------------------------------------------------------


async def test_tokens_and_vectors_are_those_of_the_original(small: LlamaEngine) -> None:
    _, vectors = await small.embed(ask(*TEXTS))
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = bert.framed(text)
        _, found = await small.tokenize(VECTORS, text, add_special=True, parse_special=False)
        assert (found, vector.token_count, vector.truncated) == (ids, len(ids), False)
        assert cosine(vector.values, bert.vector(ids)) >= 0.999, text[:20]
    assert max(vector.token_count for vector in vectors) > 250


async def test_a_full_context_is_as_good(small: LlamaEngine) -> None:
    ids = tuple(bert.framed("stars and planets " * 170))
    assert len(ids) == 512
    _, (vector,) = await small.embed(ask(ids, normalize=False))
    original = bert.vector(list(ids))
    assert cosine(vector.values, original) >= 0.999
    assert np.linalg.norm(vector.values) == pytest.approx(float(np.linalg.norm(original)), rel=1e-2)


async def test_scores_are_those_of_the_head(small: LlamaEngine) -> None:
    query = "Which animal jumps?"
    artifact, ranking = await small.rerank(RerankRequest(SCORES, query, DOCUMENTS))
    assert artifact.family == SCORES
    expected = {index: score(bert.framed(query, document)) for index, document in enumerate(DOCUMENTS)}
    assert {ranked.index for ranked in ranking.results} == set(expected)
    for ranked in ranking.results:
        assert ranked.score == pytest.approx(expected[ranked.index], abs=0.02)
    found = [ranked.score for ranked in ranking.results]
    assert found == sorted(found, reverse=True)
    assert max(found) - min(found) > 0.5
    assert ranking.token_count == sum(len(bert.framed(query, document)) for document in DOCUMENTS)
    _, best = await small.rerank(RerankRequest(SCORES, query, DOCUMENTS, top_n=2))
    assert [ranked.index for ranked in best.results] == [ranked.index for ranked in ranking.results[:2]]
    assert best.token_count == ranking.token_count


async def test_what_a_model_is_not_made_for_is_refused(small: LlamaEngine, llama: LlamaEngine) -> None:
    features = {status.artifact.family: status.features for status in small.models()}
    assert features == {
        VECTORS: {Feature.EMBED, Feature.TOKENIZE},
        SCORES: {Feature.RERANK, Feature.TOKENIZE},
    }
    with pytest.raises(UnsupportedFeatureError, match="rerank"):
        await small.rerank(RerankRequest(VECTORS, "a", ("b",)))
    with pytest.raises(UnsupportedFeatureError, match="embed"):
        await small.embed(EmbeddingRequest(SCORES, ("a",)))
    with pytest.raises(UnsupportedFeatureError, match="rerank"):
        await llama.rerank(RerankRequest("", "a", ("b",)))
    with pytest.raises(UnsupportedFeatureError):
        await hear(small, GenerationRequest(VECTORS, TextPrompt("a")))


@pytest.mark.parametrize(
    ("check", "model"),
    [
        (check, VECTORS if Feature.EMBED in needed_by(check) else SCORES)
        for check in CHECKS
        if needed_by(check) in ({Feature.EMBED}, {Feature.RERANK})
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_conformance(check: Check, model: str, small: LlamaEngine) -> None:
    await small.load(model)
    await check(Subject(small, model, TextPrompt(""), slots=2, max_queue=2, exact=False))


# --- cutting --------------------------------------------------------------------------------------------------------


async def test_what_is_cut_keeps_the_special_tokens(small: LlamaEngine) -> None:
    long = "one two three four five six seven eight nine ten " * 60
    ids = bert.token_ids(long)
    with pytest.raises(PromptTooLongError) as caught:
        await small.embed(ask("short", long))
    assert (caught.value.prompt_tokens, caught.value.context_length) == (len(ids) + 2, 512)
    first, last = bert.framed("")
    for truncate, kept in (("start", ids[-510:]), ("end", ids[:510])):
        _, (short, cut) = await small.embed(ask("short", long, truncate=truncate))
        assert (short.truncated, cut.truncated, cut.token_count) == (False, True, 512)
        assert cosine(cut.values, bert.vector([first, *kept, last])) >= 0.999
    with pytest.raises(InvalidRequestError, match="neither"):
        await small.embed(ask("a", truncate="middle"))


async def test_only_a_document_is_cut_beside_a_query(small: LlamaEngine) -> None:
    query, long = "how many", "one two three four five " * 150
    with pytest.raises(PromptTooLongError):
        await small.rerank(RerankRequest(SCORES, query, ("short", long)))
    ids, last = bert.token_ids(long), bert.framed("")[-1]
    opening = bert.framed(query)
    room = 512 - len(opening) - 1
    for truncate, kept in (("start", ids[-room:]), ("end", ids[:room])):
        _, ranking = await small.rerank(RerankRequest(SCORES, query, (long,), truncate=truncate))
        assert ranking.results[0].truncated
        assert ranking.results[0].score == pytest.approx(score([*opening, *kept, last]), abs=0.02)
    with pytest.raises(PromptTooLongError):
        await small.rerank(RerankRequest(SCORES, long, ("short",), truncate="end"))
    with pytest.raises(InvalidRequestError, match="top_n"):
        await small.rerank(RerankRequest(SCORES, query, ("short",), top_n=0))


async def test_a_causal_model_reads_long_texts_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LlamaEngine([smollm2()], SETTINGS)
    await engine.start()
    texts = ("some words " * 180, "short", "another " * 20)
    request = EmbeddingRequest("", texts, normalize=False)
    counts: list[int] = []
    decode = Context.decode
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Context, "decode", lambda self, count: counts.append(count) or decode(self, count))
            _, together = await engine.embed(request)
        assert max(counts) < 360 <= together[0].token_count < sum(counts)
        for text, vector in zip(texts, together, strict=True):
            _, (alone,) = await engine.embed(replace(request, inputs=(text,)))
            assert cosine(alone.values, vector.values) >= 0.9999
    finally:
        await engine.stop()


# --- many at once ---------------------------------------------------------------------------------------------------


async def test_requests_that_wait_are_batched_together(small: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    decode = Context.decode
    monkeypatch.setattr(Context, "decode", lambda self, count: batches.append(count) or decode(self, count))
    requests = [ask(*(f"request {number} text {place}" for place in range(20))) for number in range(2)]
    (_, first), (_, second) = await asyncio.gather(*(small.embed(request) for request in requests))
    assert len(batches) <= 5, "40 texts"
    for vectors, number in ((first, 0), (second, 1)):
        _, (last,) = await small.embed(ask(f"request {number} text 19"))
        assert cosine(last.values, vectors[19].values) >= 0.9999


async def test_a_thousand_texts_come_back_in_order(small: LlamaEngine) -> None:
    texts = [f"text {number}" for number in range(1000)]
    _, vectors = await small.embed(ask(*texts))
    assert len(vectors) == 1000
    for number in (0, 1, 499, 999):
        _, (alone,) = await small.embed(ask(texts[number]))
        assert cosine(alone.values, vectors[number].values) >= 0.9999


async def test_urgent_texts_overtake_those_that_can_wait(small: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    reading = begun(monkeypatch)

    async def run(name: str, request: EmbeddingRequest) -> None:
        await small.embed(request)
        done.append(name)

    many = asyncio.create_task(run("many", ask(*["x " * 100] * 30, priority=Priority.BATCH)))
    await reading.wait()
    assert queued(small) == 1
    await run("one", ask("y"))
    await many
    assert done == ["one", "many"]


async def test_who_goes_away_leaves_nothing_behind(
    small: LlamaEngine, llama: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = begun(monkeypatch)
    for engine, model in ((small, VECTORS), (llama, "")):
        left = asyncio.create_task(engine.embed(EmbeddingRequest(model, ("word " * 200,) * 20)))
        reading.clear()
        await reading.wait()
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        await engine.embed(EmbeddingRequest(model, ("after",)))
        assert queued(engine) == 0


async def test_one_too_many_is_refused_and_the_others_are_served(small: LlamaEngine) -> None:
    requests = [ask(*["word " * 300] * 3) for _ in range(8)]
    outcomes = await asyncio.gather(*(small.embed(request) for request in requests), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
    assert 1 <= len(refused) <= 6
    assert all(refusal.retry_after_s for refusal in refused)
    assert all(outcome in refused or not isinstance(outcome, BaseException) for outcome in outcomes)


async def test_a_batch_that_fails_fails_its_requests_alone(small: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Context.decode
    failures = iter([-3])
    monkeypatch.setattr(Context, "decode", lambda self, count: next(failures, 0) or decode(self, count))
    failed = small.embed(ask(*["word " * 300] * 2, priority=Priority.INTERACTIVE))
    other = small.embed(ask("text", priority=Priority.BACKGROUND))
    outcomes = await asyncio.gather(failed, other, return_exceptions=True)
    assert isinstance(outcomes[0], EngineError)
    assert "code -3" in outcomes[0].message
    assert not isinstance(outcomes[1], BaseException)


async def test_streams_move_on_beside_many_texts(llama: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[tuple[bool, int]] = []
    decode = Context.decode

    def counted(context: Context, count: int) -> int:
        batches.append((context.outputs == context.batch_tokens, count))  # every token's vector is put out
        return decode(context, count)

    reading = begun(monkeypatch)
    monkeypatch.setattr(Context, "decode", counted)
    stop = StopConditions(max_tokens=16, ignore_eos=True)
    stream = llama.generate(GenerationRequest("", TextPrompt("Once upon a time"), stop=stop))
    async for event in stream:
        if isinstance(event, TokenDelta):
            break
    texts = asyncio.create_task(llama.embed(EmbeddingRequest("", ("a few words of text",) * 400)))
    await reading.wait()
    async for _ in stream:
        pass
    texts.cancel()
    await asyncio.gather(texts, return_exceptions=True)
    steps = "".join("e" if embeds else "g" for embeds, _ in batches)
    beside = batches[steps.index("e") : steps.rindex("g") + 1]  # afterwards nobody is in a hurry
    assert sum(embeds for embeds, _ in beside) >= 3
    assert max(count for embeds, count in beside if embeds) <= 64
    assert "ee" not in steps[: steps.rindex("g")]


async def test_unloading_answers_those_who_wait(small: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    await small.load(SCORES)
    reading = begun(monkeypatch)
    waiting = asyncio.create_task(small.rerank(RerankRequest(SCORES, "a", ("word " * 300,) * 20)))
    await reading.wait()
    await small.unload(SCORES)
    with pytest.raises(DrainingError):
        await waiting


def queued(engine: LlamaEngine) -> int:
    return sum(report.queued for report in engine.load_report())


def begun(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """An event that is set whenever a batch of texts is about to be read."""
    loop, event, read = asyncio.get_running_loop(), asyncio.Event(), Embedder.read

    def noted(embedder: Embedder, pieces: Sequence[Piece], token_ids: Sequence[Sequence[int]]) -> list[Array | None]:
        loop.call_soon_threadsafe(event.set)
        return read(embedder, pieces, token_ids)

    monkeypatch.setattr(Embedder, "read", noted)
    return event


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system doesn't show open files")
async def test_a_context_that_cannot_be_made_leaves_no_file_open(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise EngineError("no memory")

    model = binding.Model(minilm(request.config.cache).path)
    monkeypatch.setattr("chorus.engine.llama.embedder.Context", fails)
    before = open_files()
    with pytest.raises(EngineError, match="no memory"):
        Embedder(model, longest=64, threads=1, flash_attention=True)
    assert open_files() == before
    model.close()
