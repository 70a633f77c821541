"""Engines behind HTTP: what they find, how they fail, and that nobody is left decoding for a reader who has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from chorus.config.remote import RemoteServer
from chorus.core.errors import (
    ChorusError,
    ConfigError,
    DrainingError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    UnavailableError,
    UnknownModelError,
    UnsupportedFeatureError,
)
from chorus.core.fleet.records import EngineKind, Feature, ModelState, Tier
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    Conversation,
    DeliveredChoice,
    EmbeddingRequest,
    Finished,
    FinishReason,
    GenerationRequest,
    Message,
    MessageRole,
    Progress,
    Sampling,
    Started,
    StopConditions,
    TextPart,
    TextPrompt,
    TokenDelta,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
)
from chorus.engine.remote import RemoteEngine, RemoteSettings, read_api_key
from chorus.engine.remote.failures import NoAnswerError
from chorus.engine.remote.naming import family_of, parameters_of, quantization_of
from tests.engine.upstream import BLOB, Refusal, Upstream, UpstreamModel, engine_of, until

PROMPT = TextPrompt("Once upon a time")
QUICK: dict[str, Any] = {"poll_s": 0.02, "answer_s": 0.05}
EVERY = ["ollama", "llamacpp", "vllm", "somebody"]


def chat(*texts: str, **more: Any) -> Conversation:
    return Conversation(tuple(Message(MessageRole.USER, (TextPart(text),)) for text in texts), **more)


def ask(prompt: Any = PROMPT, **changes: Any) -> GenerationRequest:
    return GenerationRequest("", prompt, **changes)


async def events_of(engine: RemoteEngine, request: GenerationRequest) -> list[Any]:
    async with aclosing(engine.generate(request)) as events:
        return [event async for event in events]


async def refusal(engine: RemoteEngine, request: GenerationRequest) -> ChorusError:
    with pytest.raises(ChorusError) as caught:
        await events_of(engine, request)
    return caught.value


def text_of(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, TokenDelta))


# --- what is found ---------------------------------------------------------------------------------------------------


async def test_what_ollama_tells_of_its_models() -> None:
    cold = UpstreamModel("qwen2.5:7b-instruct-q4_K_M", ("completion", "vision"), loaded=False)
    async with Upstream("ollama", UpstreamModel(), cold) as upstream, engine_of(upstream) as engine:
        warm, other = engine.models()
        assert (engine.info.name, engine.info.version, engine.info.kind) == ("ollama", "0.12.6", EngineKind.REMOTE)
        assert (warm.state, other.state) == (ModelState.LOADED, ModelState.AVAILABLE)
        assert (warm.context_length, warm.slot_count, warm.engine) == (512, 2, "ollama")
        artifact = warm.artifact
        assert (artifact.name, artifact.family, artifact.sha256) == ("tiny:latest", "tiny", BLOB)
        assert (artifact.parameter_count, artifact.tier, artifact.quantization) == (1_235_814_400, Tier.SMALL, "Q4_0")
        assert (artifact.context_length, artifact.architecture, artifact.size_bytes) == (8192, "llama", 807_694_464)
        assert other.artifact.family == "qwen2.5-7b-instruct"
        assert other.artifact.tags == ("chat", "vision")
        assert [load.model for load in engine.load_report()] == ["tiny:latest"]
        assert {Feature.TOOLS, Feature.REASONING} <= warm.features
        assert Feature.IMAGES in other.features - warm.features


async def test_models_of_ollama_that_are_broken_or_elsewhere_are_left_out() -> None:
    others = UpstreamModel("broken", broken=True), UpstreamModel("big-cloud", cloud=True)
    async with Upstream("ollama", *others, UpstreamModel()) as upstream, engine_of(upstream) as engine:
        assert [status.artifact.name for status in engine.models()] == ["tiny:latest"]


async def test_a_model_that_was_broken_once_is_looked_at_again() -> None:
    model = UpstreamModel(broken=True)
    async with Upstream("ollama", model) as upstream, engine_of(upstream, poll_s=0.01) as engine:
        assert engine.models() == ()
        model.broken = False
        await until(engine.models, engine)
        assert len(upstream.asked("/api/show")) == 2


@pytest.mark.parametrize("status", [500, 503])
async def test_whether_a_model_makes_vectors_is_asked_again_where_the_server_failed(status: int) -> None:
    async with Upstream("vllm", UpstreamModel("vectors", ("embedding",))) as upstream:
        upstream.refuses = "/v1/embeddings"
        upstream.refusals.extend([Refusal(status, b"{}")] * 2)
        async with engine_of(upstream, poll_s=0.01) as engine:
            await until(lambda: engine.models()[0].features == {Feature.EMBED}, engine)
        assert len(upstream.asked("/v1/embeddings")) == 3


async def test_what_others_tell_of_theirs() -> None:
    fox = UpstreamModel("/models/Fox-1B-Q8_0.gguf")
    async with Upstream("llamacpp", fox, slots=1) as upstream, engine_of(upstream) as engine:
        (status,) = engine.models()
        assert (engine.info.name, engine.info.version) == ("llama-server", "b7000")
        assert (status.artifact.name, status.artifact.family) == ("Fox-1B-Q8_0.gguf", "fox-1b")
        assert (status.context_length, status.slot_count, status.artifact.sha256) == (512, 1, "")
        await events_of(engine, ask())
        assert upstream.asked("/v1/completions")[0]["model"] == "/models/Fox-1B-Q8_0.gguf"
    async with Upstream("vllm", UpstreamModel("org/Fox-8B-AWQ")) as upstream, engine_of(upstream) as engine:
        (status,) = engine.models()
        assert (engine.info.name, engine.info.version) == ("vllm", "0.11.0")
        assert (status.artifact.family, status.artifact.quantization, status.artifact.tier) == (
            "fox-8b",
            "AWQ",
            Tier.FULL,
        )


@pytest.mark.parametrize(
    ("name", "family", "quantization", "parameters"),
    [
        ("llama3.2:latest", "llama3.2", "", 0),
        ("qwen2.5:0.5b", "qwen2.5-0.5b", "", 500_000_000),
        ("hf.co/some/Llama-3.2-3B-Instruct-GGUF:Q4_K_M", "llama-3.2-3b-instruct", "Q4_K_M", 3_000_000_000),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b-instruct-v0.1", "", 56_000_000_000),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct", "Q4_1", 135_000_000),
        ("///", "model", "", 0),
    ],
)
def test_names_tell(name: str, family: str, quantization: str, parameters: int) -> None:
    assert (family_of(name), quantization_of(name), parameters_of(name)) == (family, quantization, parameters)


async def test_changes_at_the_server_are_noticed() -> None:
    async with Upstream("ollama", UpstreamModel()) as upstream, engine_of(upstream, poll_s=0.02) as engine:
        upstream.models["tiny:latest"].loaded = False
        await until(lambda: engine.models()[0].state is ModelState.AVAILABLE, engine)
        upstream.models["new"] = UpstreamModel("new")
        await until(lambda: len(engine.models()) == 2, engine)
        del upstream.models["tiny:latest"]
        await until(lambda: [status.artifact.name for status in engine.models()] == ["new"], engine)
        assert len(upstream.asked("/api/show")) == 2  # each model was looked at once


async def test_a_cold_model_is_loaded_first_and_says_so() -> None:
    async with Upstream("ollama", UpstreamModel(loaded=False)) as upstream, engine_of(upstream) as engine:
        events = await events_of(engine, ask())
        assert [type(event) for event in events[:3]] == [Progress, Progress, Started]
        assert engine.models()[0].state is ModelState.LOADED
        await engine.unload("")
        await engine.load("", context_length=256)
        await events_of(engine, ask())
        assert upstream.asked("/api/generate")[-1]["options"]["num_ctx"] == 256
        assert upstream.asked("/api/generate")[-1]["truncate"] is False


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_the_server_sees_a_reader_go(make: str, how: str) -> None:
    async with Upstream(make) as upstream, engine_of(upstream) as engine:
        upstream.pause_after = 3
        spoke = asyncio.Event()

        async def read() -> None:
            async with aclosing(engine.generate(ask())) as events:
                async for event in events:
                    if isinstance(event, TokenDelta):
                        spoke.set()
                        if how == "close":
                            break

        task = asyncio.create_task(read())
        await spoke.wait()
        if how == "cancel":
            task.cancel()
        await asyncio.wait([task])
        await upstream.hung_up.wait()
        assert engine.load_report()[0].slots_used == 0


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("quietly", [True, False])
@pytest.mark.parametrize("after", [0, 4])
async def test_an_answer_that_ends_early_is_no_answer(make: str, quietly: bool, after: int) -> None:
    async with Upstream(make) as upstream, engine_of(upstream) as engine:
        upstream.cut_after, upstream.quietly = after, quietly
        assert isinstance(await refusal(engine, ask()), UnavailableError)
        assert engine.load_report()[0].slots_used == 0


@pytest.mark.parametrize("make", EVERY)
async def test_what_makes_no_sense_is_a_failure(make: str) -> None:
    async with Upstream(make) as upstream, engine_of(upstream) as engine:
        for line in (
            b"data: {\n",
            b"data: 7\n",
            b'data: {"error": "it exploded"}\n',
            b'data: {"error": {"code": 500}}\n',
        ):
            upstream.extra_lines = [line.removeprefix(b"data: ") if make == "ollama" else line]
            assert isinstance(await refusal(engine, ask()), EngineError)


@pytest.mark.parametrize("make", EVERY)
async def test_line_separators_and_halves_of_characters_within_text(make: str) -> None:
    async with Upstream(make) as upstream, engine_of(upstream) as engine:
        if make == "ollama":
            lines = ['{"response": "a\u2028b"}\n', '{"response": "\\ud83d"}\n', '{"response": "!", "done": true}\n']
            expected = "a\u2028b\ufffd!"
        else:
            texts = ['"a\u2028b"', '"\\ud83d"', '"\\ude42!"']
            lines = [f'data: {{"choices": [{{"text": {text}}}]}}\n\n' for text in texts]
            lines.append('data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')
            expected = "a\u2028b🙂!"
        whole = "".join(lines).encode()
        upstream.extra_lines = [whole[place : place + 3] for place in range(0, len(whole), 3)]
        assert text_of(await events_of(engine, ask())) == expected


async def test_usage_and_timings_are_the_servers() -> None:
    stop = StopConditions(max_tokens=5)
    async with Upstream("ollama") as upstream, engine_of(upstream) as engine:
        finished = (await events_of(engine, ask(stop=stop)))[-1]
        assert isinstance(finished, Finished)
        assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 5)
        assert (finished.timings.decode_s, finished.timings.prefill_s) == (0.5, 0.2)
        assert finished.timings.tokens_per_second == 10.0
        assert engine.load_report()[0].tokens_per_second == 10.0
    async with Upstream("llamacpp") as upstream, engine_of(upstream) as engine:
        started, *_, finished = await events_of(engine, ask(stop=stop))
        assert (started.prompt_tokens, started.cached_tokens) == (5, 1)
        assert (finished.usage.prompt_tokens, finished.usage.cached_tokens) == (5, 1)


@pytest.mark.parametrize("make", EVERY)
async def test_why_an_answer_ended(make: str) -> None:
    model = UpstreamModel(context=40, words=20)
    async with Upstream(make, model) as upstream, engine_of(upstream, context_length=40) as engine:

        async def reason(**stop: Any) -> FinishReason:
            finished = (await events_of(engine, ask(stop=StopConditions(**stop))))[-1]
            return finished.choices[0].reason

        assert await reason() is FinishReason.END
        assert await reason(max_tokens=7) is FinishReason.LENGTH
        model.words = 1000
        assert await reason(max_tokens=7) is FinishReason.LENGTH
        if make not in ("ollama", "somebody"):  # ours ends these at num_predict; the others as everybody does
            assert await reason() is FinishReason.CONTEXT_FULL


@pytest.mark.parametrize("make", ["ollama", "llamacpp", "vllm"])
async def test_tools_constraints_and_conversations(make: str) -> None:
    tool = Tool("weather", "tells the weather", {"type": "object", "properties": {"city": {"type": "string"}}})
    call = ToolCall("c1", "weather", '{"city": "Köln"}')
    messages = (
        Message(MessageRole.USER, (TextPart("Weather?"),)),
        Message(MessageRole.ASSISTANT, (call,)),
        Message(MessageRole.TOOL, (ToolResult("c1", "rain"),)),
    )
    async with Upstream(make) as upstream, engine_of(upstream) as engine:
        path = "/api/chat" if make == "ollama" else "/v1/chat/completions"
        events = await events_of(engine, ask(Conversation(messages), tools=(tool,)))
        (made,) = [event.tool_call for event in events if isinstance(event, TokenDelta) and event.tool_call]
        assert (made.name, json.loads(made.arguments_json)) == ("weather", {"city": "Köln"})
        assert made.id
        assert events[-1].choices[0].reason is FinishReason.TOOL_CALL
        body = upstream.asked(path)[-1]
        assert [message["role"] for message in body["messages"]] == ["user", "assistant", "tool"]
        assert body["tools"][0]["function"]["name"] == "weather"
        schema = Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "object"}')
        await events_of(engine, ask(chat("x"), constraint=schema, tools=(tool,), tool_choice=ToolChoice.NONE))
        body = upstream.asked(path)[-1]
        told = body["format"] if make == "ollama" else body["response_format"]["json_schema"]["schema"]
        assert told == {"type": "object"}
        assert "tools" not in body
        grammar = Constraint(ConstraintKind.GRAMMAR, 'root ::= "a"')
        if make == "llamacpp":
            await events_of(engine, ask(constraint=grammar))
            assert upstream.asked("/v1/completions")[-1]["grammar"] == grammar.source
        else:
            error = await refusal(engine, ask(constraint=grammar))
            assert isinstance(error, UnsupportedFeatureError)
            assert error.metadata["feature"] == "grammar"


def lines_of(*choices: dict[str, Any]) -> list[bytes]:
    said = [f"data: {json.dumps({'choices': [{'index': 0, **choice}]})}\n\n".encode() for choice in choices]
    return [*said, b"data: [DONE]\n\n"]


async def test_odd_ends_of_answers() -> None:
    async with Upstream("vllm") as upstream, engine_of(upstream) as engine:

        async def answered(*choices: dict[str, Any]) -> list[Any]:
            upstream.extra_lines = lines_of(*choices)
            return await events_of(engine, ask(chat("x"), stop=StopConditions(max_tokens=5)))

        hi = {"delta": {"content": "hi"}, "finish_reason": ""}
        for reason in ("error", "abort"):
            upstream.extra_lines = lines_of(hi, {"finish_reason": reason})
            assert isinstance(await refusal(engine, ask(chat("x"))), EngineError)
        call = {"delta": {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]}}
        finish = {"finish_reason": "tool_calls"}
        events = await answered(call, finish, finish, hi)
        assert [event.tool_call for event in events if isinstance(event, TokenDelta)] == [ToolCall("a", "f", "{}")]
        events = await answered(hi, {"finish_reason": "length"})  # and not a word about how many tokens that were
        assert text_of(events) == "hi"
        assert events[-1].choices[0].reason is FinishReason.LENGTH


@pytest.mark.parametrize("make", ["ollama", "llamacpp", "vllm"])
@pytest.mark.parametrize("odd", ["NaN", "1e999", '"\\ud800"', "{"])
async def test_json_that_no_server_reads_is_the_callers_mistake(make: str, odd: str) -> None:
    async with Upstream(make) as upstream, engine_of(upstream) as engine:
        schema = Constraint(ConstraintKind.JSON_SCHEMA, f'{{"const": {odd}}}')
        error = await refusal(engine, ask(constraint=schema))
        assert isinstance(error, InvalidRequestError)
        assert error.metadata["field"] == "json_schema"
        called = Conversation((Message(MessageRole.ASSISTANT, (ToolCall("a", "f", odd),)),))
        text = TextPart("\ud800")
        for prompt in [called] * (make == "ollama") + [Conversation((Message(MessageRole.USER, (text,)),))]:
            assert isinstance(await refusal(engine, ask(prompt)), InvalidRequestError)


async def test_thinking_is_told_apart() -> None:
    async with Upstream("ollama") as upstream, engine_of(upstream) as engine:
        events = await events_of(engine, ask(chat("x", template_variables={"enable_thinking": True})))
        assert [event.reasoning for event in events if isinstance(event, TokenDelta) and event.reasoning] == ["Hm."]
        assert "Hm." not in text_of(events)
        assert isinstance(await refusal(engine, ask(chat("x", template_variables={"y": 1}))), UnsupportedFeatureError)


async def test_going_on_from_text_where_that_is_allowed() -> None:
    resume = (DeliveredChoice(0, (), "Well, "),)
    async with Upstream("llamacpp") as upstream, engine_of(upstream) as engine:
        assert isinstance(await refusal(engine, ask(resume=resume)), UnsupportedFeatureError)
        events = await events_of(engine, ask(resume=resume, allow_text_resume=True))
        assert upstream.asked("/v1/completions")[-1]["prompt"] == f"{PROMPT.text}Well, "
        assert next(event for event in events if isinstance(event, TokenDelta)).index == 0
        # llama-server repeats the message that it goes on with; that part was delivered already.
        choice = '{{"choices": [{{"delta": {{"content": "{}"}}, "finish_reason": {}}}]}}'
        said = [("We", "null"), ("ll, t", "null"), ("hen", "null"), ("", '"stop"')]
        upstream.extra_lines = [f"data: {choice.format(*words)}\n\n".encode() for words in said]
        events = await events_of(engine, ask(chat("x"), resume=resume, allow_text_resume=True))
        assert text_of(events) == "then"
        only_ids = (DeliveredChoice(0, (1, 2)),)
        error = await refusal(engine, ask(resume=only_ids, allow_text_resume=True))
        assert isinstance(error, UnsupportedFeatureError)


@pytest.mark.parametrize("make", EVERY)
async def test_text_that_must_have_a_form_is_not_gone_on_with(make: str) -> None:
    """The server would begin the form anew in the middle of it."""
    had = (DeliveredChoice(0, (), '{"age": '),)
    form = Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "object"}')
    async with Upstream(make) as upstream, engine_of(upstream) as engine:
        error = await refusal(engine, ask(resume=had, allow_text_resume=True, constraint=form))
        assert isinstance(error, UnsupportedFeatureError)


@pytest.mark.parametrize("make", EVERY)
async def test_going_on_takes_what_was_delivered_off_the_limit(make: str) -> None:
    had = (DeliveredChoice(0, (), "Well, there ", token_count=3),)
    path, limit = ("/api/generate", "num_predict") if make == "ollama" else ("/v1/completions", "max_tokens")
    async with Upstream(make) as upstream, engine_of(upstream) as engine:

        async def finished_of(max_tokens: int | None) -> tuple[list[Any], Finished]:
            request = ask(resume=had, allow_text_resume=True, stop=StopConditions(max_tokens=max_tokens))
            *deltas, finished = [e for e in await events_of(engine, request) if isinstance(e, TokenDelta | Finished)]
            assert finished.usage.completion_tokens == finished.choices[0].token_count
            return deltas, finished

        deltas, finished = await finished_of(10)
        body = upstream.asked(path)[-1]
        assert body.get("options", body)[limit] == 7
        assert [delta.index for delta in deltas] == list(range(3, 10))
        assert (finished.choices[0].reason, finished.choices[0].token_count) == (FinishReason.LENGTH, 10)
        deltas, finished = await finished_of(None)
        assert [delta.index for delta in deltas] == list(range(3, 67))
        assert (finished.choices[0].reason, finished.choices[0].token_count) == (FinishReason.END, 67)
        asked = len(upstream.asked(path))
        for none_left in (3, 2):
            deltas, finished = await finished_of(none_left)
            assert deltas == []
            assert (finished.choices[0].reason, finished.choices[0].token_count) == (FinishReason.LENGTH, 3)
        assert len(upstream.asked(path)) == asked  # nobody is asked, or paid, for nothing


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("sampling", [Sampling(seed=2**64 - 1), Sampling(seed=-1 % 2**31), Sampling(top_k=0)])
async def test_sampling_is_told_in_the_servers_words(make: str, sampling: Sampling) -> None:
    async with Upstream(make) as upstream, engine_of(upstream) as engine:
        if sampling.seed is not None and Feature.SEED not in engine.models()[0].features:
            assert isinstance(await refusal(engine, ask(sampling=sampling)), UnsupportedFeatureError)
            return
        await events_of(engine, ask(sampling=sampling))
        body = upstream.asked("/api/generate" if make == "ollama" else "/v1/completions")[-1]
        told = body.get("options", body)
        assert (told["temperature"], told["top_p"]) == (0.8, 0.95)
        assert 0 <= told.get("seed", 0) < 2**31 - 1
        assert ("min_p" in told) == (make != "somebody")


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY)
async def test_a_dead_server_leaves_and_comes_back(make: str) -> None:
    async with Upstream(make) as upstream, engine_of(upstream, poll_s=0.02) as engine:
        upstream.pause_after = 2
        stream = engine.generate(ask())
        async for event in stream:
            if isinstance(event, TokenDelta):
                break
        await upstream.die()
        with pytest.raises(UnavailableError):
            async for _ in stream:
                pass
        await until(lambda: not engine.models(), engine)
        assert engine.load_report() == ()
        error = await refusal(engine, ask())
        assert isinstance(error, UnavailableError)
        assert upstream.url in error.message
        upstream.pause_after = None
        await upstream.live()
        await until(engine.models, engine)
        assert text_of(await events_of(engine, ask()))


async def test_a_server_that_is_not_there_yet_is_waited_for() -> None:
    upstream = Upstream("ollama")
    async with upstream:
        pass
    async with engine_of(upstream, poll_s=0.02) as engine:
        assert engine.models() == ()
        async with upstream:
            await until(engine.models, engine)


async def test_a_server_that_hangs_leaves_and_its_streams_end() -> None:
    async with Upstream("llamacpp") as upstream, engine_of(upstream, **QUICK) as engine:
        upstream.pause_after = 2
        reading = asyncio.create_task(events_of(engine, ask()))
        upstream.silent = True
        with pytest.raises(UnavailableError):
            await reading
        await until(lambda: not engine.models(), engine)
        upstream.silent = False
        await until(engine.models, engine)


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("after", [0, 3])
async def test_a_server_that_loses_what_was_asked_of_it_is_not_waited_for(make: str, after: int) -> None:
    limits = {"prompt_timeout_s": 0.1} if after == 0 else {"token_timeout_s": 0.1}
    async with Upstream(make) as upstream, engine_of(upstream, **limits) as engine:
        upstream.pause_after = after
        async with asyncio.timeout(10):
            errors = await asyncio.gather(*(refusal(engine, ask()) for _ in range(3)))
        assert {type(error) for error in errors} == {NoAnswerError}
        assert upstream.streams == 0 or await upstream.hung_up.wait()
        assert (engine.load_report()[0].slots_used, engine.load_report()[0].queued) == (0, 0)
        upstream.pause_after = None
        assert text_of(await events_of(engine, ask()))


async def test_only_in_the_middle_of_an_answer_is_silence_short() -> None:
    async with Upstream("vllm") as upstream, engine_of(upstream, token_timeout_s=1e-6) as engine:
        call = Tool("weather", "tells the weather", {})  # whose call a server may keep until it has all of it
        for request in (ask(stop=StopConditions(max_tokens=0)), ask(chat("x"), tools=(call,))):
            assert isinstance((await events_of(engine, request))[-1], Finished)
        assert isinstance(await refusal(engine, ask()), NoAnswerError)


@pytest.mark.parametrize("breaks", [False, True])
async def test_an_answer_is_whole_at_its_finish_reason(breaks: bool) -> None:
    async with Upstream("somebody") as upstream, engine_of(upstream) as engine:
        choice = 'data: {{"choices": [{{"delta": {{"content": "{}"}}, "finish_reason": {}}}]}}\n\n'
        upstream.extra_lines = [choice.format("hi", "null").encode(), choice.format("", '"stop"').encode(), None]
        upstream.pause_after = None if breaks else 2
        async with asyncio.timeout(10):
            events = await events_of(engine, ask(chat("x")))
        assert text_of(events) == "hi"
        assert events[-1].choices[0].reason is FinishReason.END


async def test_callers_are_no_sign_that_a_server_lives() -> None:
    async with Upstream("vllm") as upstream, engine_of(upstream, **QUICK) as engine:
        upstream.silent = True

        async def call_on() -> None:
            while True:  # while the server is asked about itself, one caller gives up and the next one comes
                upstream.came.clear()
                await upstream.came.wait()
                if upstream.seen[-1].path == "/v1/models":
                    calls.append(asyncio.create_task(events_of(engine, ask())))
                    for call in calls[:-1]:
                        call.cancel()

        calls: list[asyncio.Task[list[Any]]] = []
        calling = asyncio.create_task(call_on())
        try:
            await until(lambda: not engine.models(), engine)
        finally:
            for task in (calling, *calls):
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)


async def first_token(events: AsyncIterator[Any]) -> None:
    while not isinstance(await anext(events), TokenDelta):
        pass


@pytest.mark.parametrize("end", ["silence", "stop"])
async def test_streams_of_a_model_that_the_server_lists_no_more_are_not_forgotten(end: str) -> None:
    models = UpstreamModel(), UpstreamModel("other")
    async with Upstream("ollama", *models) as upstream, engine_of(upstream, **QUICK) as engine:

        def names() -> list[str]:
            return [status.artifact.name for status in engine.models()]

        upstream.pause_after = 1
        async with aclosing(engine.generate(GenerationRequest("tiny:latest", PROMPT))) as events:
            await first_token(events)
            gone = upstream.models.pop("tiny:latest")
            await until(lambda: names() == ["other"], engine)
            upstream.models["tiny:latest"] = gone
            await until(lambda: len(names()) == 2, engine)
            assert {load.model: load.slots_used for load in engine.load_report()} == {"tiny:latest": 1, "other": 0}
            del upstream.models["tiny:latest"]
            await until(lambda: names() == ["other"], engine)
            if end == "stop":
                await engine.stop()
            upstream.silent = True
            with pytest.raises(DrainingError if end == "stop" else UnavailableError):
                async with asyncio.timeout(10):
                    await anext(events)


async def test_a_model_that_goes_by_another_name_keeps_its_streams() -> None:
    async with Upstream("vllm", UpstreamModel("a/m")) as upstream, engine_of(upstream, **QUICK) as engine:
        upstream.pause_after = 1
        async with aclosing(engine.generate(ask())) as events:
            await first_token(events)
            upstream.models["b/m"] = UpstreamModel("b/m")  # the short name says no longer which one is meant
            await until(lambda: len(engine.models()) == 2, engine)
            assert [(load.model, load.slots_used) for load in engine.load_report()] == [("a/m", 1), ("b/m", 0)]


async def test_what_the_server_refuses_is_said_in_chorus_words() -> None:
    async with Upstream("vllm") as upstream, engine_of(upstream) as engine:

        async def answered(status: int, message: str = "", **headers: str) -> ChorusError:
            body = json.dumps({"error": {"message": message}}).encode() if message else b"<html>"
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            upstream.refusals.append(Refusal(status, body, named))
            return await refusal(engine, ask())

        invalid = await answered(400, "temperature must be\nnon-negative " + "x" * 1000)
        assert isinstance(invalid, InvalidRequestError)
        assert "temperature must be non-negative" in invalid.message
        assert len(invalid.message) < 500
        assert isinstance(await answered(404, "The model does not exist"), UnknownModelError)
        for words in ("", "File Not Found"):
            assert isinstance(await answered(404, words), EngineError)
        busy = await answered(429, "slow down", retry_after="7")
        assert isinstance(busy, OverloadedError)
        assert busy.retry_after_s == 7.0
        soon = await answered(503, retry_after="Wed, 21 Oct 2015 07:28:00 GMT")
        assert isinstance(soon, OverloadedError)
        assert soon.retry_after_s == 1.0
        assert isinstance(await answered(500, "CUDA error"), EngineError)
        assert isinstance(await answered(302, location="http://elsewhere"), EngineError)
        key = await answered(401, "no")
        assert isinstance(key, EngineError)
        assert "runner.remote_api_key_file" in key.message
        long = await answered(400, "The maximum context length is 512 tokens. However, you requested 900 tokens "
                              "(600 in the messages, 300 in the completion).")  # fmt: skip
        assert isinstance(long, PromptTooLongError)
        assert (long.prompt_tokens, long.context_length) == (600, 512)
        room = await answered(400, "You passed 25 input tokens and requested 1000 output tokens. However, the model's "
                              "context length is only 512 tokens")  # fmt: skip
        assert isinstance(room, InvalidRequestError)
        assert room.metadata["field"] == "stop.max_tokens"


async def test_embeddings_are_cut_or_refused() -> None:
    model = UpstreamModel("vectors", ("embedding",), context=8)
    long = EmbeddingRequest("", ("word " * 9,), truncate="end")
    async with Upstream("llamacpp", model) as upstream, engine_of(upstream) as engine:
        artifact, (one, two) = await engine.embed(EmbeddingRequest("vectors", ("a b c", "d")))
        assert (artifact.name, one.token_count, two.token_count) == ("vectors", 3, 1)
        for request in (long, EmbeddingRequest("", ((1, 2),))):
            with pytest.raises(UnsupportedFeatureError):
                await engine.embed(request)
        with pytest.raises(UnsupportedFeatureError):
            await engine.tokenize("", "x", add_special=False, parse_special=False)
        with pytest.raises(UnsupportedFeatureError):
            await engine.unload("")


async def test_stopping_ends_streams_waits_and_loads() -> None:
    async with Upstream("ollama", UpstreamModel(), UpstreamModel("cold", loaded=False)) as upstream:
        async with engine_of(upstream) as engine:
            upstream.pause_after = 2
            streams = [engine.generate(ask()) for _ in range(3)]
            for stream in streams:
                await anext(stream)
            upstream.silent = True
            loading = asyncio.create_task(engine.load("cold"))
            while upstream.asked("/api/generate")[-1]["stream"] is not False:
                upstream.came.clear()
                await upstream.came.wait()
            await engine.stop()
            for stream in streams:
                with pytest.raises(DrainingError):
                    async for _ in stream:
                        pass
            with pytest.raises(DrainingError):
                await loading
            assert isinstance(await refusal(engine, ask()), DrainingError)
        await upstream.hung_up.wait()


async def test_a_load_ends_with_its_server() -> None:
    async with Upstream("ollama", UpstreamModel(loaded=False)) as upstream, engine_of(upstream, **QUICK) as engine:
        upstream.silent = True
        loading = asyncio.create_task(engine.load(""))
        with pytest.raises(UnavailableError):
            await loading
        assert engine.models() == ()


# --- keys and addresses ----------------------------------------------------------------------------------------------


async def test_a_key_comes_from_a_file_and_is_shown_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret-key\n")
    async with Upstream("vllm", api_key="s3cret-key") as upstream:
        async with engine_of(upstream, api_key=read_api_key(file)) as engine:
            assert text_of(await events_of(engine, ask()))
        server = RemoteServer.parse(upstream.setting)
        settings = RemoteSettings(server, api_key="s3cret-wrong")
        assert "s3cret" not in repr(settings)
        with pytest.raises(ConfigError, match=r"runner\.remote_api_key_file") as caught:
            await RemoteEngine(settings).start()
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("content", [b"", b"two words\n", b"one\ntwo\n", b"\xff", b"x" * 20_000])
def test_a_key_file_that_holds_no_key(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_api_key(file)
    assert "two" not in caught.value.message.replace(str(file), "")
    with pytest.raises(ConfigError):
        read_api_key(tmp_path / "missing")


@pytest.mark.parametrize(
    ("url", "kind", "plaintext"),
    [
        ("http://127.0.0.1:1", EngineKind.REMOTE, False),
        ("http://localhost:1", EngineKind.REMOTE, False),
        ("http://[::1]:1", EngineKind.REMOTE, False),
        ("http://192.168.1.7:1", EngineKind.REMOTE, True),
        ("http://attic:1", EngineKind.REMOTE, True),
        ("https://attic.lan", EngineKind.REMOTE, False),
        ("https://api.example.com/v1", EngineKind.EXTERNAL, False),
        ("http://8.8.8.8", EngineKind.EXTERNAL, True),
    ],
)
async def test_who_may_see_a_prompt(url: str, kind: EngineKind, plaintext: bool) -> None:
    engine = RemoteEngine(RemoteSettings(RemoteServer.parse(f"openai={url}")))
    assert (engine.info.kind, engine.info.plaintext) == (kind, plaintext)
    await engine.stop()
    await engine.stop()
