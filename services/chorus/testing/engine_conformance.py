"""What every engine must do, as checks that run against any of them.

`CHECKS` are coroutine functions of a `Subject`; run each on a subject with its model loaded and idle, and it leaves the
subject so. They raise `AssertionError`. `needed_by` tells which features a check is about.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

from chorus.core.errors import (
    DrainingError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    UnknownModelError,
    UnsupportedFeatureError,
)
from chorus.core.fleet.records import Feature, ModelState
from chorus.core.generation import (
    Conversation,
    DeliveredChoice,
    EmbeddingRequest,
    FinishReason,
    ImagePart,
    Message,
    MessageRole,
    Progress,
    PromptScored,
    Queued,
    RerankRequest,
    Sampling,
    Started,
    StopConditions,
    TextPrompt,
    TokenDelta,
    TokenPrompt,
)
from chorus.testing.engine_subject import (
    Heard,
    Subject,
    ask,
    assert_idle,
    expect,
    hear,
    hear_anew,
    rest_of,
    status_of,
)

_TEXTS = ("plain words", "émigré 🙂👩‍🚀", "สวัสดีชาวโลก", "line\nline\ttab  spaces", "{'a': [1, 2]}")
_SAME_VECTOR = 0.9999  # the least cosine; a batch's shape decides the last bits
_SAME_SCORE = 0.01
_NEARLY_EQUAL = 0.2  # natural logarithm; below it, numerics may decide between two tokens

Check = Callable[[Subject], Awaitable[None]]
CHECKS: list[Check] = []
_NEEDED: dict[str, frozenset[Feature]] = {}


def needed_by(check: Check) -> frozenset[Feature]:
    """The features that a model must have for this check to say anything."""
    return _NEEDED[check.__name__]


def _check(*features: Feature) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS.append(check)
        _NEEDED[check.__name__] = frozenset(features)
        return check

    return register


@_check(Feature.IGNORE_EOS)
async def a_stream_has_the_order_of_the_contract(subject: Subject) -> None:
    """Started, deltas with every index once, Finished with true counts."""
    heard = await hear(subject.engine, ask(subject))
    status = status_of(subject)
    assert (heard.started.artifact, heard.started.artifact_sha256) == (status.artifact.name, status.artifact.sha256)
    assert heard.started.context_length == status.context_length
    assert [outcome.reason for outcome in heard.finished.choices] == [FinishReason.LENGTH]
    assert heard.finished.usage.completion_tokens == 12
    timings = heard.finished.timings
    assert timings.time_to_first_token_s >= 0.0
    assert timings.decode_s >= 0.0
    assert not math.isnan(timings.tokens_per_second)


@_check(Feature.TOKEN_IDS, Feature.TOKENIZE)
async def text_is_that_of_the_tokens_however_wild(subject: Subject) -> None:
    """Whole characters only, even where tokens drawn nearly at random hold pieces of them."""
    for seed in range(3):
        wild = Sampling(temperature=5.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
        heard = await hear(subject.engine, ask(subject, 40, wild))
        expected = await subject.engine.detokenize(subject.model, heard.ids(), show_special=False)
        assert heard.text() == expected


@_check(Feature.IGNORE_EOS)
async def greedy_answers_are_the_same_every_time(subject: Subject) -> None:
    """Alone, the likeliest tokens of a prompt do not change."""
    first = await hear_anew(subject, ask(subject))
    again = await hear_anew(subject, ask(subject))
    assert (first.ids(), first.text()) == (again.ids(), again.text())


@_check(Feature.SEED)
async def a_seed_reproduces_an_answer(subject: Subject) -> None:
    """And a seed that the engine chose itself, and told, does too."""
    warm = Sampling(temperature=1.0, seed=2**64 - 1)
    first = await hear_anew(subject, ask(subject, sampling=warm))
    again = await hear_anew(subject, ask(subject, sampling=warm))
    assert first.started.seed == 2**64 - 1
    assert first.text() == again.text()
    chosen = await hear_anew(subject, ask(subject, sampling=Sampling(temperature=1.0)))
    told = Sampling(temperature=1.0, seed=chosen.started.seed)
    assert (await hear_anew(subject, ask(subject, sampling=told))).text() == chosen.text()


@_check(Feature.MULTIPLE_CHOICES, Feature.IGNORE_EOS)
async def several_choices_come_to_their_ends(subject: Subject) -> None:
    """More choices than slots, too."""
    count = subject.slots + 1
    heard = await hear(subject.engine, ask(subject, 5, choice_count=count))
    assert [outcome.token_count for outcome in heard.finished.choices] == [5] * count
    assert all(heard.text(choice) for choice in range(count))


@_check(Feature.IGNORE_EOS)
async def stop_strings_end_an_answer_and_stay_out_of_it(subject: Subject) -> None:
    """Wherever they lie, across tokens above all; the choice says which one it was."""
    heard = await hear_anew(subject, ask(subject))
    text = heard.text()
    ends = [sum(len(delta.text) for delta in heard.deltas[:count]) for count in range(1, len(heard.deltas))]
    inner = [end for end in ends if 1 < end < len(text) - 1]
    for end in inner[:3]:
        stop = text[end - 2 : end + 2]
        conditions = StopConditions(max_tokens=12, strings=("\0never", stop), ignore_eos=True)
        stopped = await hear_anew(subject, ask(subject, stop=conditions))
        if not (subject.exact or subject.forget or text.startswith(stopped.text())):  # another token, by a rounding
            assert stop not in stopped.text()
            continue
        assert stopped.text() == text[: text.index(stop)]
        assert (stopped.finished.choices[0].reason, stopped.finished.choices[0].stop_string) == (
            FinishReason.STOP,
            stop,
        )


@_check(Feature.TOKEN_IDS, Feature.IGNORE_EOS)
async def a_stop_token_ends_an_answer(subject: Subject) -> None:
    """It is delivered, without text."""
    ids = (await hear_anew(subject, ask(subject))).ids()
    stop_at = ids[4]
    conditions = StopConditions(max_tokens=12, token_ids=(stop_at,), ignore_eos=True)
    stopped = await hear_anew(subject, ask(subject, stop=conditions))
    assert stopped.ids() == ids[: ids.index(stop_at) + 1]
    assert stopped.finished.choices[0].reason is FinishReason.STOP


@_check(Feature.IGNORE_EOS)
async def no_tokens_are_an_answer_too(subject: Subject) -> None:
    """`max_tokens` 0 reads the prompt and ends."""
    heard = await hear(subject.engine, ask(subject, 0))
    assert not heard.deltas
    assert heard.finished.choices[0].reason is FinishReason.LENGTH


@_check(Feature.IGNORE_EOS, Feature.TOKENIZE, Feature.TOKEN_INPUT)
async def without_a_limit_the_context_is_the_limit(subject: Subject) -> None:
    """The answer ends when prompt and answer fill it; a prompt that leaves no room at all is too long."""
    context = status_of(subject).context_length
    _, ids = await subject.engine.tokenize(subject.model, "again", add_special=False, parse_special=False)
    nearly_full = ask(subject, prompt=TokenPrompt((ids[0],) * (context - 9)))
    for conditions in (StopConditions(ignore_eos=True), StopConditions(max_tokens=10, ignore_eos=True)):
        heard = await hear(subject.engine, replace(nearly_full, stop=conditions))
        assert heard.finished.choices[0].reason is FinishReason.CONTEXT_FULL
        assert heard.finished.choices[0].token_count == 9
    fits = await hear(subject.engine, replace(nearly_full, stop=StopConditions(max_tokens=9, ignore_eos=True)))
    assert fits.finished.choices[0].reason is FinishReason.LENGTH
    full = TokenPrompt((ids[0],) * context)
    await expect(PromptTooLongError, hear(subject.engine, ask(subject, prompt=full)))


@_check(Feature.RESUME, Feature.TOKEN_IDS, Feature.LOGPROBS)
async def a_stream_goes_on_from_every_split(subject: Subject) -> None:
    """With the next index and the same text; another token only where two were nearly as likely."""
    conditions = StopConditions(max_tokens=10, strings=("\0never",), ignore_eos=True)
    request = ask(subject, stop=conditions, logprobs=2)
    whole = await hear(subject.engine, request)
    ids = whole.ids()
    for split in range(len(ids) + 1):
        resumed = await hear(subject.engine, replace(request, resume=(DeliveredChoice(0, tuple(ids[:split])),)))
        assert resumed.finished.choices[0].token_count == 10
        rest = resumed.ids()
        if rest == ids[split:]:
            assert resumed.text() == "".join(delta.text for delta in whole.deltas[split:])
            continue
        assert not subject.exact
        place = next(place for place, pair in enumerate(zip(rest, ids[split:], strict=True)) if pair[0] != pair[1])
        likeliest = whole.logprobs()[split + place].alternatives
        assert likeliest[0].logprob - likeliest[1].logprob < _NEARLY_EQUAL


@_check(Feature.RESUME, Feature.TOKEN_IDS, Feature.MULTIPLE_CHOICES, Feature.SEED)
async def choices_resume_each_from_its_own_place(subject: Subject) -> None:
    """One had ended, one had begun, one had not."""
    sampling = Sampling(temperature=1.0, seed=11)
    request = ask(subject, 8, sampling, choice_count=3)
    whole = await hear(subject.engine, request)
    delivered = (DeliveredChoice(0, tuple(whole.ids(0))), DeliveredChoice(2, tuple(whole.ids(2)[:3])))
    resumed = await hear(subject.engine, replace(request, resume=delivered))
    assert not resumed.ids(0)
    assert (len(resumed.ids(1)), len(resumed.ids(2))) == (8, 5)
    if subject.exact:
        assert (resumed.ids(1), resumed.ids(2)) == (whole.ids(1), whole.ids(2)[3:])


@_check(Feature.LOGPROBS, Feature.IGNORE_EOS)
async def log_probabilities_are_those_of_a_distribution(subject: Subject) -> None:
    """Natural logarithms, likeliest first, that sum to 1 at most; greedy takes the first."""
    heard = await hear_anew(subject, ask(subject, logprobs=5))
    assert len(heard.logprobs()) == 12
    for scored in heard.logprobs():
        values = [alternative.logprob for alternative in scored.alternatives]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1.0 + 1e-4
        assert (scored.token_id, scored.logprob) == (scored.alternatives[0].token_id, values[0])
    plain = await hear_anew(subject, ask(subject, logprobs=0))
    assert [len(scored.alternatives) for scored in plain.logprobs()] == [0] * 12
    assert plain.ids() == heard.ids()


@_check(Feature.PROMPT_LOGPROBS)
async def a_prompt_is_scored_token_by_token(subject: Subject) -> None:
    """Even where nothing is to be generated."""
    for tokens in (0, 3):
        heard = await hear(subject.engine, ask(subject, tokens, prompt_logprobs=1))
        scored = next(event for event in heard.events if isinstance(event, PromptScored)).tokens
        assert len(scored) == heard.started.prompt_tokens
        assert scored[0].logprob == 0.0
        assert all(token.logprob < 0.0 and len(token.alternatives) == 1 for token in scored[1:])


@_check(Feature.TOKENIZE, Feature.TOKEN_INPUT, Feature.IGNORE_EOS)
async def token_ids_are_a_prompt_as_they_are(subject: Subject) -> None:
    """The ids of a text draw the same answer as the text."""
    text = "The rain in Spain"
    _, ids = await subject.engine.tokenize(subject.model, text, add_special=True, parse_special=False)
    from_text = await hear_anew(subject, ask(subject, prompt=TextPrompt(text)))
    from_ids = await hear_anew(subject, ask(subject, prompt=TokenPrompt(tuple(ids))))
    assert from_text.text() == from_ids.text()
    assert from_ids.started.prompt_tokens == len(ids)


@_check(Feature.TOKENIZE)
async def tokens_are_text_again(subject: Subject) -> None:
    """Any text survives tokenizing; an id that is none is refused; a prompt is counted as it is read."""
    for text in _TEXTS:
        artifact, ids = await subject.engine.tokenize(subject.model, text, add_special=False, parse_special=False)
        assert artifact == status_of(subject).artifact
        assert await subject.engine.detokenize(subject.model, ids, show_special=False) == text
    for wrong in (-1, 2**40):
        await expect(InvalidRequestError, subject.engine.detokenize(subject.model, [wrong], show_special=False))
    _, count = await subject.engine.count_tokens(subject.model, subject.prompt, ())
    assert count == (await hear(subject.engine, ask(subject, 0))).started.prompt_tokens


@_check(Feature.EMBED)
async def vectors_have_length_one_and_follow_from_the_text(subject: Subject) -> None:
    """In order, and as they come where that is asked."""
    request = EmbeddingRequest(subject.model, ("one", "two", "one"))
    artifact, vectors = await subject.engine.embed(request)
    assert artifact == status_of(subject).artifact
    assert all(abs(math.hypot(*vector.values) - 1.0) < 1e-3 for vector in vectors)
    assert vectors[0].values != vectors[1].values
    assert max(abs(a - b) for a, b in zip(vectors[0].values, vectors[2].values, strict=True)) < 1e-4
    _, raw = await subject.engine.embed(replace(request, normalize=False))
    assert math.hypot(*raw[0].values) != math.hypot(*raw[1].values) or not subject.exact


@_check(Feature.EMBED)
async def a_text_has_the_same_vector_alone_and_in_company(subject: Subject) -> None:
    """However many texts a request has, of whatever lengths, and whoever else asks meanwhile."""
    texts = tuple(f"{text} {number}" for number, text in enumerate(_TEXTS * 4))
    request = EmbeddingRequest(subject.model, texts)
    (_, together), _ = await asyncio.gather(
        subject.engine.embed(request), subject.engine.embed(replace(request, inputs=texts[::-1]))
    )
    for text, vector in zip(texts, together, strict=True):
        _, (alone,) = await subject.engine.embed(replace(request, inputs=(text,)))
        assert (alone.token_count, alone.truncated) == (vector.token_count, False)
        assert sum(a * b for a, b in zip(alone.values, vector.values, strict=True)) >= _SAME_VECTOR


@_check(Feature.EMBED)
async def a_long_text_is_refused_or_cut_as_asked(subject: Subject) -> None:
    """By what the text itself has; its end or its start goes, where the engine can do that."""
    context = status_of(subject).context_length
    long = " ".join(f"word{number % 7}" for number in range(2 * context))
    request = EmbeddingRequest(subject.model, ("short", long))
    refused = await expect(PromptTooLongError, subject.engine.embed(request))
    assert isinstance(refused, PromptTooLongError)
    assert refused.context_length <= context
    assert refused.context_length < refused.prompt_tokens
    vectors = {}
    for truncate in ("end", "start"):
        try:
            _, (short, cut) = await subject.engine.embed(replace(request, truncate=truncate))
        except UnsupportedFeatureError:
            assert truncate == "start"  # what servers behind HTTP lack
            continue
        assert (short.truncated, cut.truncated) == (False, True)
        assert short.token_count < cut.token_count <= context
        vectors[truncate] = cut.values
    assert "end" in vectors
    assert vectors.get("start") != vectors["end"]


@_check(Feature.RERANK)
async def documents_come_back_best_first(subject: Subject) -> None:
    """Each once, with the same score in any company; only the best where that is asked; long ones refused or cut."""
    documents = (*_TEXTS, "other words", "plain words")
    request = RerankRequest(subject.model, "plain words", documents)
    artifact, ranking = await subject.engine.rerank(request)
    assert artifact == status_of(subject).artifact
    assert sorted(ranked.index for ranked in ranking.results) == list(range(len(documents)))
    scores = [ranked.score for ranked in ranking.results]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]
    assert ranking.token_count > 0
    by_index = {ranked.index: ranked.score for ranked in ranking.results}
    assert abs(by_index[0] - by_index[len(documents) - 1]) < _SAME_SCORE
    for index, document in enumerate(documents):
        _, alone = await subject.engine.rerank(replace(request, documents=(document,)))
        assert abs(alone.results[0].score - by_index[index]) < _SAME_SCORE
    _, best = await subject.engine.rerank(replace(request, top_n=2))
    assert [ranked.score for ranked in best.results] == scores[:2] or not subject.exact
    assert len(best.results) == 2
    long = "word " * (2 * status_of(subject).context_length)
    await expect(PromptTooLongError, subject.engine.rerank(replace(request, documents=("short", long))))
    _, cut = await subject.engine.rerank(replace(request, documents=("short", long), truncate="end"))
    assert {ranked.index: ranked.truncated for ranked in cut.results} == {0: False, 1: True}


@_check()
async def what_cannot_be_done_is_refused_by_name(subject: Subject) -> None:
    """An unknown model, a missing feature, a prompt longer than the context: each before anything else."""
    unknown = await expect(UnknownModelError, hear(subject.engine, ask(subject, model="no-such-model")))
    assert status_of(subject).artifact.name in unknown.message
    digest = replace(ask(subject).requirements, artifact_sha256="0" * 64)
    await expect(UnknownModelError, hear(subject.engine, ask(subject, requirements=digest)))
    picture = Conversation((Message(MessageRole.USER, (ImagePart(b"", "image/png"),)),))
    missing = await expect(UnsupportedFeatureError, hear(subject.engine, ask(subject, prompt=picture)))
    assert missing.metadata["feature"] in (Feature.CHAT.value, Feature.IMAGES.value)
    context = status_of(subject).context_length
    long = await expect(
        PromptTooLongError, hear(subject.engine, ask(subject, prompt=TextPrompt("word " * (2 * context))))
    )
    assert isinstance(long, PromptTooLongError)
    assert long.context_length == context < long.prompt_tokens
    await expect(UnknownModelError, subject.engine.load("no-such-model"))
    await assert_idle(subject)


@_check(Feature.IGNORE_EOS)
async def closing_a_stream_frees_its_slot(subject: Subject) -> None:
    """After the first delta, after the first event, and before any."""
    for wanted in (TokenDelta, Started):
        async with aclosing(subject.engine.generate(ask(subject, 200))) as events:
            async for event in events:
                if isinstance(event, wanted):
                    break
        await assert_idle(subject)
    unread = subject.engine.generate(ask(subject, 200))
    await unread.aclose()
    await assert_idle(subject)


@_check(Feature.IGNORE_EOS)
async def cancelling_a_reader_frees_its_slot(subject: Subject) -> None:
    """Whatever it was waiting for."""
    for turns in range(6):
        task = asyncio.create_task(hear(subject.engine, ask(subject, 200)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await assert_idle(subject)


@_check(Feature.IGNORE_EOS)
async def streams_share_the_engine(subject: Subject) -> None:
    """More than there are slots, at once: each one whole, and nobody's tokens in another's."""
    count = min(2 * subject.slots, subject.slots + subject.max_queue)
    prompts = [TextPrompt(f"Number {number} is") for number in range(count)]
    alone = [await hear(subject.engine, ask(subject, prompt=prompt)) for prompt in prompts]
    together = await asyncio.gather(*(hear(subject.engine, ask(subject, prompt=prompt)) for prompt in prompts))
    for one, other in zip(alone, together, strict=True):
        assert one.started.prompt_tokens == other.started.prompt_tokens
        if subject.exact:
            assert one.ids() == other.ids()
    await assert_idle(subject)


@_check(Feature.IGNORE_EOS)
async def a_full_engine_lets_wait_and_then_refuses(subject: Subject) -> None:
    """Those who wait are told so; one too many is refused, with a time to come back; then everybody is served."""
    long = ask(subject, 200)
    tasks: list[asyncio.Task[Heard]] = []
    held = [subject.engine.generate(long) for _ in range(subject.slots)]
    try:
        for stream in held:
            async for event in stream:
                if isinstance(event, TokenDelta):
                    break
        waiting = [subject.engine.generate(ask(subject, 2)) for _ in range(subject.max_queue)]
        for place, stream in enumerate(waiting):
            first = await anext(stream)
            assert isinstance(first, Queued)
            assert first.position == place
        refused = await expect(OverloadedError, hear(subject.engine, ask(subject, 2)))
        assert refused.retry_after_s is not None
        assert refused.retry_after_s > 0
        tasks = [asyncio.create_task(rest_of(stream)) for stream in waiting]
    finally:
        for stream in held:
            await stream.aclose()
    for heard in await asyncio.gather(*tasks):
        assert heard.finished.usage.completion_tokens == 2
    await assert_idle(subject)


@_check()
async def a_model_is_loaded_once_and_unloads(subject: Subject) -> None:
    """Loads at the same time share one; unloading ends streams with `DrainingError`, or lets them finish."""
    engine = subject.engine
    changes: list[ModelState] = []
    engine.on_change(lambda: changes.append(status_of(subject).state))
    stream = engine.generate(ask(subject, 200))
    async for event in stream:
        if isinstance(event, TokenDelta):
            break
    status = await engine.unload(subject.model)
    assert status.state is ModelState.AVAILABLE
    assert not [load for load in engine.load_report() if load.model == status.artifact.name]
    await expect(DrainingError, rest_of(stream))
    progress: list[Progress] = []
    loads = await asyncio.gather(engine.load(subject.model, progress.append), engine.load(subject.model))
    assert [load.state for load in loads] == [ModelState.LOADED] * 2
    assert progress
    assert progress[-1].done == progress[-1].total > 0
    assert changes == [ModelState.AVAILABLE, ModelState.LOADING, ModelState.LOADED]
    stream = engine.generate(ask(subject, 8))
    async for event in stream:
        if isinstance(event, TokenDelta):
            break
    unloading = asyncio.create_task(engine.unload(subject.model, wait=True))
    rest = await rest_of(stream)
    assert rest.finished.usage.completion_tokens == 8
    assert (await unloading).state is ModelState.AVAILABLE
    heard = await hear(engine, ask(subject, 1))
    assert any(isinstance(event, Progress) for event in heard.events)
