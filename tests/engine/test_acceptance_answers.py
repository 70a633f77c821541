"""The answers are llama.cpp's own, and a stream goes on from every split as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from chorus.core.fleet.records import Feature
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    Conversation,
    DeliveredChoice,
    FinishReason,
    GenerationRequest,
    Message,
    MessageRole,
    Sampling,
    StopConditions,
    TextPart,
    TokenDelta,
    Tool,
)
from chorus.engine.llama import LlamaEngine
from chorus.testing.engine_subject import GREEDY, Heard, hear
from chorus.testing.packaged_models import smollm2_path
from tests.engine.acceptance import ask, assert_close, serving
from tests.engine.conftest import gemma, smollm2

pytestmark = pytest.mark.asyncio(loop_scope="session")

_BEGINNINGS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "SELECT name, age FROM users WHERE",
    "La capitale de l'Italie est",
    "Die Hauptstadt von Deutschland ist",
    "El perro corre por",
    "日本の首都は",
    "Столица России —",
    "กรุงเทพมหานครเป็น",
    "🙂 🙂 🙂",
    "1, 2, 3, 4,",
    '{"name": "Ada", "born":',
    "<html>\n<body>\n",
    "Q: What is the boiling point of water?\nA:",
    "<|im_start|>user\nTell me a joke.<|im_end|>\n<|im_start|>assistant\n",
    "\n\n\n",
    "    indented",
)
_ENDINGS = ("", " a man who said that", " — 42! ", "\nTherefore")
TOKENS = 20
PROMPTS = [beginning + ending for ending in _ENDINGS for beginning in _BEGINNINGS][:49]
PROMPTS.append("The quick brown fox jumps over the lazy dog. " * 30)


def of_the_wrapper(path: Path, prompts: list[str], tokens: int) -> Iterator[list[int]]:
    """Greedy answers of llama-cpp-python's `Llama`, each from an empty memory."""
    wrapper: Any = llama_cpp.Llama(
        str(path), n_ctx=512, n_batch=512, n_ubatch=512, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False
    )
    try:
        for prompt in prompts:
            wrapper.reset()
            ids = wrapper.tokenize(
                prompt.encode(), add_bos=wrapper.metadata["general.architecture"] == "gemma3", special=True
            )
            stream = wrapper.generate(ids, temp=0.0, repeat_penalty=1.0)
            yield [next(stream) for _ in range(tokens)]
    finally:
        wrapper.close()


async def test_50_greedy_answers_equal_those_of_the_wrapper() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 50
    expected = list(of_the_wrapper(smollm2_path(), PROMPTS, TOKENS))
    async with serving(smollm2(), slots=1, context_length=512, batch_tokens=512, prefill_tokens=512) as engine:
        for prompt, ids in zip(PROMPTS, expected, strict=True):
            await engine.forget_cache()
            assert (await hear(engine, ask(prompt, TOKENS))).ids() == ids, prompt


async def test_gemma_answers_as_in_the_wrapper(gemma_path: Path) -> None:
    prompts = [*PROMPTS[:6], PROMPTS[-1]]
    expected = list(of_the_wrapper(gemma_path, prompts, 12))
    # in pieces of the size that the wrapper takes: other sums are rounded otherwise
    sizes = {"batch_tokens": 512, "micro_batch_tokens": 512, "prefill_tokens": 512}
    async with serving(gemma(gemma_path), slots=1, context_length=512, **sizes) as engine:
        for prompt, ids in zip(prompts, expected, strict=True):
            await engine.forget_cache()
            assert (await hear(engine, ask(prompt, 12))).ids() == ids, prompt


# --- resume at every split ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A request to interrupt at every token of its answer."""

    name: str
    request: GenerationRequest

    @property
    def greedy(self) -> bool:
        return self.request.sampling.temperature == 0.0


_TOOL = Tool("weather", "", {"type": "object"})
_CALL = '<tool_call>{"name": "weather", "arguments": {"city": "%s"}}</tool_call>\n'
# A template that is its first message alone: what a model is shown is what a test wrote.
_PLAIN_TEMPLATE = "{% if tools %}{# <tool_call> #}{% endif %}{{ messages[0].content }}"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "ages": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}


def cases(features: frozenset[Feature]) -> list[Case]:
    """What is interrupted: characters of several tokens, stop strings, everything that has a state."""
    penalized = Sampling(
        temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2, penalty_window=12, seed=77
    )
    calls = Conversation(
        (Message(MessageRole.USER, (TextPart("".join(_CALL % city for city in ("Bern", "Rome", "Oslo", "Bonn"))),)),)
    )
    found = [
        Case("emoji", ask("🙂👩‍🚀🙂👩‍🚀🙂👩‍🚀🙂👩‍🚀", 20, logprobs=20)),
        Case("thai", ask("สวัสดีชาวโลก สวัสดีชาวโลก สวัสดีชาวโลก ", 20, logprobs=20)),
        Case("penalties and a seed", ask("the cat and the dog and the cat and", 20, penalized, logprobs=20)),
        Case("a bias", ask("1 2 3", 12, replace(GREEDY, logit_bias={35: 4.0, 29: -100.0}), logprobs=20)),
        Case(
            "tool calls",
            ask(calls, 36, tools=(_TOOL,), logprobs=20),
        ),
    ]
    if Feature.JSON_SCHEMA in features:
        schema = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA))
        for name, sampling in (("json", GREEDY), ("json drawn", Sampling(temperature=0.9, seed=3))):
            request = ask("A person as JSON:\n", 40, sampling, constraint=schema, logprobs=20)
            found.append(Case(name, replace(request, stop=StopConditions(max_tokens=40))))
    return found


async def wild(engine: LlamaEngine) -> Case:
    """Tokens drawn nearly at random, some of which hold pieces of characters, whole ones among them or not."""
    for seed in range(20):
        sampling = Sampling(temperature=6.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
        request = ask("Once upon a time", 20, sampling, logprobs=20)
        if has_half_characters(await hear(engine, request)):
            return Case("wild", request)
    raise AssertionError("400 tokens drawn nearly at random hold no half character")


def has_half_characters(heard: Heard) -> bool:
    """Whether some token completed no character, or held what never became one."""
    return any(not delta.text for delta in heard.deltas[:-1]) or "\ufffd" in heard.text()


async def every_case(engine: LlamaEngine) -> list[Case]:
    """What is interrupted, as far as this engine can do it."""
    return [*cases(engine.models()[0].features), await wild(engine), *await with_stop_strings(engine)]


async def with_stop_strings(engine: LlamaEngine) -> list[Case]:
    """Stop strings that lie across tokens of the answer, and one that nearly comes and is text after all."""
    request = ask("Once upon a time", 20, logprobs=20)
    text = (await hear(engine, request)).text()
    half = len(text) // 2
    nearly = tuple(text[at : at + 6] + "\0" for at in range(0, len(text) - 6, 5))
    stops = {"a stop string": (*nearly, text[half : half + 7]), "nearly a stop string": nearly}
    return [
        Case(name, replace(request, stop=replace(request.stop, strings=strings))) for name, strings in stops.items()
    ]


def joined(whole: Heard, split: int, rest: Heard) -> str:
    return "".join(delta.text for delta in whole.deltas if delta.index < split) + rest.text()


def resumed(case: Case, whole: Heard, split: int) -> GenerationRequest:
    """The request as a coordinator sends it after so many tokens were delivered."""
    sampling = replace(case.request.sampling, seed=whole.started.seed)
    return replace(case.request, sampling=sampling, resume=(DeliveredChoice(0, tuple(whole.ids()[:split])),))


async def first_delta(engine: LlamaEngine, request: GenerationRequest) -> TokenDelta | None:
    """The first token of a stream, which is then left."""
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            if isinstance(event, TokenDelta):
                return event
    return None


async def test_the_next_token_is_the_uninterrupted_one_at_every_split() -> None:
    """Alone, as the uninterrupted one was: in an engine that has nothing of it, or has it all in memory."""
    splits = 0
    mismatches: list[str] = []
    async with serving(smollm2(chat_template=_PLAIN_TEMPLATE), slots=8, context_length=256) as engine:
        for case in await every_case(engine):
            await engine.forget_cache()
            whole = await hear(engine, case.request)
            for split in range(len(whole.ids()) + 1):
                if split % 8 == 0:
                    await engine.forget_cache()
                splits += 1
                found = await first_delta(engine, resumed(case, whole, split))
                expected = next((delta for delta in whole.deltas if delta.index == split), None)
                if found is None or expected is None:
                    assert found is expected
                elif assert_close(expected.logprobs, found.logprobs, greedy=case.greedy) is None:
                    assert found == replace(expected, logprobs=found.logprobs), f"{case.name}, split at {split}"
                else:
                    mismatches.append(f"{case.name} at {split}: {expected.token_ids} became {found.token_ids}")
    assert splits > 150
    assert len(mismatches) <= splits // 100, f"{len(mismatches)} of {splits}: {mismatches}"


async def test_streams_that_were_split_end_as_they_would_have() -> None:
    """Many at once, each from its own split to its end."""
    async with serving(
        smollm2(chat_template=_PLAIN_TEMPLATE),
        slots=8,
        max_queue=64,
        context_length=256,
        kv_tokens=2048,
        speculation=True,
    ) as engine:
        for case in await every_case(engine):
            await engine.forget_cache()
            whole = await hear(engine, case.request)
            ids, calls = whole.ids(), [delta for delta in whole.deltas if delta.tool_call]
            assert len(ids) > 8, f"{case.name}: nothing to interrupt"
            assert has_half_characters(whole) or case.name not in ("emoji", "thai"), f"{case.name}: no half characters"
            assert calls or case.name != "tool calls"
            splits = [*range(0, len(ids), 3), len(ids)]
            rests = await asyncio.gather(*(hear(engine, resumed(case, whole, split)) for split in splits))
            for split, rest in zip(splits, rests, strict=True):
                where = f"{case.name}, split at {split} of {len(ids)}"
                assert rest.started.prompt_tokens == whole.started.prompt_tokens, where
                if assert_close(whole.logprobs()[split:], rest.logprobs(), greedy=case.greedy) is not None:
                    continue
                assert rest.ids() == ids[split:], where
                assert joined(whole, split, rest) == whole.text(), where
                assert rest.finished.choices == whole.finished.choices, where
                called = [delta.tool_call for delta in rest.deltas if delta.tool_call]
                assert called == [delta.tool_call for delta in calls if delta.index >= split], where


async def test_json_stays_valid_over_every_split() -> None:
    """What numerics change may change the answer; what a schema promises holds all the same."""
    async with serving(smollm2(), slots=8, max_queue=64, context_length=256, kv_tokens=2048) as engine:
        if Feature.JSON_SCHEMA not in engine.models()[0].features:
            return
        schema = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA))
        request = ask("A person as JSON:\n", 45, Sampling(temperature=1.5, seed=9), constraint=schema)
        request = replace(request, stop=StopConditions(max_tokens=45))
        whole = await hear(engine, request)
        ids = whole.ids()
        for split in range(0, len(ids) + 1, 6):
            rest = await hear(engine, replace(request, resume=(DeliveredChoice(0, tuple(ids[:split])),)))
            if rest.finished.choices[0].reason is FinishReason.END:
                assert json.loads(joined(whole, split, rest)).keys() == {"name", "ages"}
