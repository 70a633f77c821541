"""Answers with a form, from the real engine: JSON Schemas by the hundred, grammars and regular expressions, resumed."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from typing import Any

import jsonschema
import pytest
import pytest_asyncio

from chorus.core.errors import InvalidRequestError
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    DeliveredChoice,
    FinishReason,
    GenerationRequest,
    Sampling,
    StopConditions,
    TextPrompt,
)
from chorus.engine.llama import LlamaEngine, LlamaSettings, binding
from chorus.testing.engine_subject import Heard, hear
from tests.engine.conftest import smollm2, smollm2_path

pytestmark = pytest.mark.asyncio(loop_scope="module")

_SCHEMAS = 200
_PROMPTS = ("Answer in JSON: ", "The record of the first customer:\n", "user: describe a cat\nassistant: ")
_STREAMS = 16


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wide(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LlamaEngine]:
    # as Q4_0, which a CPU reads twice as fast: six hundred answers take minutes otherwise
    path = tmp_path_factory.mktemp("wide") / "smollm2-q4_0.gguf"
    binding.quantize(smollm2_path(), path, "Q4_0", threads=1)
    settings = LlamaSettings(slots=_STREAMS, context_length=192, max_queue=_STREAMS, threads=1)
    engine = LlamaEngine([smollm2(path)], settings)
    await engine.start()
    await engine.load("")
    yield engine
    await engine.stop()


def exactly(text: str) -> Any:
    """JSON with its numbers as they are written: 17.00000000000000000001 is more than 17, and as a float it is not."""
    return json.loads(text, parse_float=Decimal)


def schemas(count: int) -> list[dict[str, Any]]:
    """So many JSON Schemas of all kinds, the same every time; each with small documents."""
    rng = random.Random(20)
    words = ["red", "green", "blue", "small", "large", "cat", "dog", "été", 'quo"te', "yes"]
    names = ["name", "age", "kind", "size", "tags", "when", "note", "x", "is valid", "größe"]

    def number(kind: str) -> dict[str, Any]:
        low = rng.choice([-20, -1, 0, 1, 17])
        bounds: dict[str, Any] = {"minimum": low, "maximum": low + rng.choice([1, 9, 250])}
        if rng.random() < 0.3:
            bounds = {"exclusiveMinimum": low, "exclusiveMaximum": low + rng.choice([3, 100])}
        if kind == "integer" and rng.random() < 0.3:
            bounds = {"multipleOf": rng.choice([2, 5, 10]), "minimum": 0, "maximum": 1000}
        return {"type": kind, **bounds}

    def string() -> dict[str, Any]:
        lengths = {"minLength": rng.randrange(3), "maxLength": rng.randrange(3, 12)}
        patterns = ["^[a-z]{2,6}$", "^[A-Z][a-z]+$", "^\\d{3}-\\d{4}$", "^(yes|no|maybe)$", "^#[0-9a-f]{6}$"]
        formats = ["date", "time", "date-time", "ipv4", "uuid", "email"]
        return rng.choice([
            {"type": "string", **lengths},
            {"type": "string", "pattern": rng.choice(patterns)},
            {"type": "string", "format": rng.choice(formats)},
        ])  # fmt: skip

    def leaf() -> dict[str, Any]:
        return rng.choice([
            lambda: number("integer"),
            lambda: number("number"),
            string,
            lambda: {"enum": rng.sample(words, 3)},
            lambda: {"enum": [1, "two", None, True]},
            lambda: {"const": rng.choice([*words, 3, None, [1, "a"], {"k": 1}])},
            lambda: {"type": "boolean"},
            lambda: {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
            lambda: {"$ref": "#/$defs/point"},
        ])()  # fmt: skip

    def value(depth: int) -> dict[str, Any]:
        if depth == 0 or rng.random() < 0.4:
            return leaf()
        return rng.choice([_array, _object, _object, _any_of, _all_of])(depth)

    def _array(depth: int) -> dict[str, Any]:
        least = rng.randrange(3)
        if rng.random() < 0.25:
            items = [leaf(), leaf()]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": 2, "maxItems": 2}
        return {"type": "array", "items": value(depth - 1), "minItems": least, "maxItems": least + rng.randrange(1, 3)}

    def _object(depth: int) -> dict[str, Any]:
        used = rng.sample(names, rng.randrange(1, 4))
        properties = {name: value(depth - 1) for name in used}
        required = [name for name in used if rng.random() < 0.7]
        extra = rng.choice([*[False] * 9, {"type": "boolean"}])
        # a name that comes twice is no JSON object to a validator, so what may be added is small and of one kind
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": extra}

    def _any_of(depth: int) -> dict[str, Any]:
        return {"anyOf": [value(depth - 1), leaf(), {"type": "null"}]}

    def _all_of(depth: int) -> dict[str, Any]:
        return {"allOf": [_object(depth), {"type": "object"}]}

    point = {
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "y": {"enum": [0, 1]}},
        "required": ["x", "y"],
        "additionalProperties": False,
    }
    kinds = [_object, _object, _array, value]
    return [{"$defs": {"point": point}, **kinds[number % 4](1 + number % 8 // 6)} for number in range(count)]


def asked(constraint: Constraint, prompt: str = _PROMPTS[0], seed: int = 1, tokens: int = 72) -> GenerationRequest:
    return GenerationRequest(
        "",
        TextPrompt(prompt),
        sampling=Sampling(temperature=0.8, seed=seed),
        stop=StopConditions(max_tokens=tokens),
        constraint=constraint,
    )


@pytest.mark.parametrize("number", range(len(_PROMPTS)))  # a test for each: no single one takes minutes
async def test_whatever_the_schema_the_answer_is_valid(wide: LlamaEngine, number: int) -> None:
    """200 schemas with 3 prompts each: all valid unless cut by the length, which most are not."""
    waiting = iter(enumerate(schemas(_SCHEMAS)))
    cut = 0

    async def answer_some() -> None:
        nonlocal cut
        for seed, schema in waiting:
            constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))
            heard = await hear(wide, asked(constraint, _PROMPTS[number], len(_PROMPTS) * seed + number))
            reason = heard.finished.choices[0].reason
            if reason is not FinishReason.END:
                assert reason is FinishReason.LENGTH
                cut += 1
                continue
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.Draft202012Validator(schema, format_checker=checker).validate(exactly(heard.text()))

    await asyncio.gather(*(answer_some() for _ in range(_STREAMS)))
    assert cut < _SCHEMAS / 2, f"{cut} of {_SCHEMAS} were cut"


_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "mood": {"enum": ["🙂 glad", "สวัสดี", "sad"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 120}, "minItems": 2,
                 "maxItems": 3},
    },
    "required": ["name", "mood", "ages"],
    "additionalProperties": False,
}  # fmt: skip


async def test_a_json_stream_goes_on_from_every_split(wide: LlamaEngine) -> None:
    """In the middle of a character, too; with penalties and a seed; and the whole is as valid."""
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(_PERSON))
    sampling = Sampling(temperature=0.8, seed=4, frequency_penalty=0.2)
    request = replace(asked(constraint, tokens=90), sampling=sampling)
    whole = await hear(wide, request)
    assert whole.finished.choices[0].reason is FinishReason.END
    ids = whole.ids()
    said = ["".join(delta.text for delta in whole.deltas[:split]) for split in range(len(ids) + 1)]
    splits = range(0, len(ids) + 1, 3)
    resumed = await asyncio.gather(
        *(hear(wide, replace(request, resume=(DeliveredChoice(0, tuple(ids[:split])),))) for split in splits)
    )
    for split, rest in zip(splits, resumed, strict=True):
        assert rest.finished.choices[0].reason is FinishReason.END
        jsonschema.validate(exactly(said[split] + rest.text()), _PERSON)


async def test_delivered_tokens_that_do_not_fit_are_refused(wide: LlamaEngine) -> None:
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(_PERSON))
    _, wrong = await wide.tokenize("", '{"name": 3', add_special=False, parse_special=False)
    with pytest.raises(InvalidRequestError, match="does not fit"):
        await hear(wide, replace(asked(constraint), resume=(DeliveredChoice(0, tuple(wrong)),)))


@pytest.mark.parametrize(
    ("kind", "source", "form"),
    [
        (ConstraintKind.REGEX, r"(\d{1,3}\.){3}\d{1,3}", r"(\d{1,3}\.){3}\d{1,3}"),
        (ConstraintKind.REGEX, r"[A-Z][a-z]{2,9} [A-Z][a-z]{2,9}!?", r"[A-Z][a-z]{2,9} [A-Z][a-z]{2,9}!?"),
        (ConstraintKind.GRAMMAR, 'root ::= "yes" | "no" | "may" "be"?', "yes|no|may(be)?"),
        (ConstraintKind.GRAMMAR, 'root ::= "(" root ")" | [0-9]{1,2}', r"\(*\d{1,2}\)*"),
    ],
)
async def test_texts_have_the_form_that_was_asked_for(
    wide: LlamaEngine, kind: ConstraintKind, source: str, form: str
) -> None:
    """Every choice of several, each its own way; with logprobs, which are those before the mask."""
    request = replace(asked(Constraint(kind, source), tokens=60), choice_count=4, logprobs=1)
    heard = await hear(wide, request)
    for choice in heard.finished.choices:
        text = heard.text(choice.choice)
        if choice.reason is FinishReason.END:
            assert re.fullmatch(form, text), text
            assert text.count("(") == text.count(")")
    assert any(choice.reason is FinishReason.END for choice in heard.finished.choices)


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        (ConstraintKind.GRAMMAR, "answer ::= [a-z]", "no rule named root"),
        (ConstraintKind.JSON_SCHEMA, "{", "double quotes"),
        (ConstraintKind.JSON_SCHEMA, '{"not": {}}', "Unimplemented keys"),
        (ConstraintKind.REGEX, "(", "unclosed group"),
    ],
)
async def test_what_is_no_constraint_is_refused_with_the_reason(
    wide: LlamaEngine, kind: ConstraintKind, source: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        await hear(wide, asked(Constraint(kind, source)))
    assert kind.value in caught.value.message or caught.value.metadata


async def test_the_end_cannot_be_ignored_in_a_form(wide: LlamaEngine) -> None:
    request = replace(asked(Constraint(ConstraintKind.REGEX, "a")), stop=StopConditions(max_tokens=5, ignore_eos=True))
    with pytest.raises(InvalidRequestError, match="ends where its form is complete"):
        await hear(wide, request)


async def test_constrained_and_free_streams_share_a_batch(wide: LlamaEngine) -> None:
    """The form of one is not the form of another."""
    constraint = Constraint(ConstraintKind.REGEX, "[xyz]{4}")
    free = replace(asked(constraint), constraint=None, stop=StopConditions(max_tokens=6, ignore_eos=True))
    results: list[Heard] = await asyncio.gather(
        *(hear(wide, asked(constraint, seed=seed) if seed % 2 else free) for seed in range(12))
    )
    for seed, heard in enumerate(results):
        assert bool(re.fullmatch("[xyz]{4}", heard.text())) == bool(seed % 2)
