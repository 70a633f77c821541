"""Anything at all, in any order and broken off anywhere, in a process of its own: it answers, refuses, and lives on."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from chorus.core.errors import ChorusError
from chorus.core.fleet.records import Feature
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    Conversation,
    DeliveredChoice,
    Dry,
    EmbeddingRequest,
    GenerationRequest,
    Message,
    MessageRole,
    Priority,
    RerankRequest,
    Sampling,
    StopConditions,
    TextPart,
    TextPrompt,
    TokenPrompt,
    Xtc,
)
from chorus.engine.llama import LlamaEngine, ModelSource
from chorus.testing.engine_subject import hear
from tests.engine.acceptance import ask, serving, watching
from tests.engine.conftest import smollm2

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROUNDS, AT_A_TIME = 60, 6
CONTEXT = 128
ODD_IDS = (-1, 0, 1, 2, 49_151, 49_152, 2**31 - 1, 2**31, 2**40, -(2**31))
ODD_NUMBERS = (0.0, -1.0, 1e-9, 0.5, 1.0, 1e30, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "a", "<|im_end|>", "\x00", "🙂👩‍🚀" * 4, "\ud800", "สวัสดี", "word " * 400, "\n\n", "\u202e" * 5)
REFUSALS = {"INVALID_REQUEST", "PROMPT_TOO_LONG", "UNSUPPORTED_FEATURE", "OVERLOADED", "DRAINING", "NOT_FOUND"}
OUTCOMES = {"heard", "left", "cancelled", "embedded", "unloaded", "tokenized", "forgot"}
SOURCES = {
    ConstraintKind.GRAMMAR: (
        'root ::= "yes" | "no"', "root ::= root", "root ::=", "", "\x00", 'root ::= [a-z]+ "\\n"', "root ::= [", "x",
        "root ::= " + "(" * 500, 'root ::= a\na ::= b | "x"\nb ::= a', 'root ::= "🙂"+',
        "root ::= [^\\x00-\\x7f]{1,999999}", 'root ::= ("a"?){100000}', "root ::= nowhere",
    ),
    ConstraintKind.JSON_SCHEMA: (
        "{}", "true", "false", "null", "[]", "", "{", '{"type": "object"}', '{"type": "nothing"}', '{"enum": []}',
        '{"$ref": "#"}', '{"$ref": "#/nowhere"}', '{"type": "string", "pattern": "("}', '{"const": "\\ud800"}',
        '{"type": "array", "minItems": 1000000000}', '{"allOf": [{"type": "string"}, {"type": "integer"}]}',
        '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}',
        '{"$ref": "https://example.org/schema.json"}', '{"a":' * 2000 + "1" + "}" * 2000,
    ),
    ConstraintKind.REGEX: (
        "a*", "(", "[", "", "(a+)+$", "\\p{L}{1,9}", "(?=x)", "a{1000000000}", "\x00", "🙂+", "^$", "\\1",
    ),
}  # fmt: skip


class Asker:
    """Makes requests up, most of them sound, from one seed."""

    def __init__(self, seed: int, features: frozenset[Feature]) -> None:
        self.rng = random.Random(seed)
        self.features = features
        self.odd = True

    def oddly(self, likely: float) -> bool:
        """Whether this is to be something that no sound request holds."""
        return self.odd and self.rng.random() < likely

    def ids(self, most: int) -> tuple[int, ...]:
        rng = self.rng
        return tuple(
            rng.choice(ODD_IDS) if self.oddly(0.05) else rng.randrange(49_152) for _ in range(rng.randrange(most))
        )

    def number(self, *sound: float) -> float:
        return self.rng.choice(ODD_NUMBERS) if self.oddly(0.1) else self.rng.choice(sound)

    def sampling(self) -> Sampling:
        rng, number = self.rng, self.number
        found = Sampling(
            temperature=number(0.0, 0.0, 0.8, 5.0),
            top_k=rng.choice((0, 1, 40, 40, 10**9, -1 if self.oddly(0.2) else 5)),
            top_p=number(0.9, 1.0, 0.01),
            min_p=number(0.0, 0.05, 1.0),
            typical_p=number(1.0, 1.0, 0.5),
            repetition_penalty=number(1.0, 1.0, 1.3, 10.0),
            presence_penalty=number(0.0, 0.0, 1.0, -2.0),
            frequency_penalty=number(0.0, 0.0, 1.0, -2.0),
            penalty_window=rng.choice((0, 1, 64, 2**31, 2**32 - 1)),
            logit_bias={token: number(-100.0, 100.0, 3.0) for token in self.ids(3)},
            seed=rng.choice((None, 0, 1, 2**63, 2**64 - 1, 2**64 if self.oddly(0.2) else 7)),
        )
        if Feature.DRY in self.features and rng.random() < 0.2:
            breakers = rng.choice((("\n",), (), ("",), ("🙂", "\x00")))
            found = replace(
                found,
                dry=Dry(
                    number(0.8, 0.0),
                    number(1.75, 1.0),
                    rng.choice((2, 0, 10**9)),
                    rng.choice((None, 0, 3, 2**40)),
                    breakers,
                ),
            )
        if Feature.XTC in self.features and rng.random() < 0.2:
            found = replace(found, xtc=Xtc(number(0.5, 0.0, 1.0), number(0.1, 0.0, 0.5)))
        return found

    def constraint(self) -> Constraint | None:
        kinds = [kind for kind in ConstraintKind if Feature(kind.value) in self.features]
        if not kinds or self.rng.random() < 0.7:
            return None
        kind = self.rng.choice(kinds)
        return Constraint(kind, self.rng.choice(SOURCES[kind]))

    def prompt(self) -> TextPrompt | TokenPrompt | Conversation:
        rng = self.rng
        kind = rng.random()
        if kind < 0.5:
            shared = (300, 301, 302, 303) * rng.randrange(9)
            return TokenPrompt((*shared, *self.ids(30)) or (5,))
        if kind < 0.8:
            return TextPrompt(rng.choice(TEXTS if self.odd else TEXTS[1:5]) + rng.choice(("", " Once upon a time")))
        roles = [rng.choice(tuple(MessageRole)) for _ in range(rng.randrange(4))]
        return Conversation(
            tuple(
                Message(role, tuple(TextPart(rng.choice(TEXTS[:6])) for _ in range(rng.randrange(3)))) for role in roles
            ),
            continue_last=rng.random() < 0.2,
        )

    def request(self) -> GenerationRequest:
        rng = self.rng
        self.odd = rng.random() < 0.3
        count = rng.choice((1, 1, 1, 2, 5, 0 if self.oddly(0.2) else 3, 129 if self.oddly(0.2) else 1))
        resume = tuple(
            DeliveredChoice(count + 3 if self.oddly(0.1) else choice, self.ids(20))
            for choice in range(max(count, 1))
            if rng.random() < 0.2
        )
        strings = tuple(rng.choice((*TEXTS[:4], " the", "e")) for _ in range(rng.randrange(3)))
        constraint = self.constraint()
        return GenerationRequest(
            "",
            self.prompt(),
            sampling=self.sampling(),
            stop=StopConditions(
                rng.choice((0, 1, 3, 8, 25, 10**9 if self.oddly(0.2) else 4, -1 if self.oddly(0.2) else 4)),
                strings,
                self.ids(3),
                rng.random() < 0.5 and (constraint is None or self.odd),
            ),
            choice_count=count,
            logprobs=rng.choice((None, None, 0, 2, 20, 21 if self.oddly(0.2) else 1)),
            prompt_logprobs=rng.choice((None, None, None, 0, 5, -1 if self.oddly(0.2) else 20)),
            constraint=constraint,
            resume=resume,
            priority=rng.choice(tuple(Priority)),
            adapter=rng.choice(("nobody", "../up", "\x00", "🙂" * 99)) if self.oddly(0.1) else "",
            context_shift=rng.random() < 0.15,
        )

    def embedding(self) -> EmbeddingRequest:
        rng, self.odd = self.rng, True
        inputs = tuple(rng.choice((*TEXTS, self.ids(20), self.ids(200))) for _ in range(rng.randrange(3)))
        return EmbeddingRequest("", inputs, rng.random() < 0.5, rng.choice((None, "start", "end", "middle")))


async def one(engine: LlamaEngine, asker: Asker, loadable: asyncio.Event) -> str:
    """Does one thing, perhaps broken off; returns what came of it. `loadable`: nobody unloads the model just now."""
    rng = asker.rng
    what = rng.random()
    unloads = 0.09 <= what < 0.10
    try:
        if what < 0.08:
            await engine.embed(asker.embedding())
            return "embedded"
        if what < 0.09:
            await engine.rerank(
                RerankRequest("", rng.choice(TEXTS), tuple(rng.sample(TEXTS, 2)), rng.choice((None, -1, 9)))
            )
            return "ranked"
        if unloads:
            loadable.clear()
            await engine.unload("", wait=rng.random() < 0.5)
            return "unloaded"
        if what < 0.13:
            await engine.tokenize("", rng.choice(TEXTS), add_special=True, parse_special=True)
            await engine.detokenize("", asker.ids(20), show_special=True)
            return "tokenized"
        if what < 0.15:
            await engine.forget_cache()
            return "forgot"
        if what < 0.6:
            await hear(engine, asker.request())
            return "heard"
        events, left = engine.generate(asker.request()), rng.randrange(6)
        if what < 0.8:
            async with aclosing(events):
                async for _ in events:
                    left -= 1
                    if left < 0:
                        return "left"
            return "heard"
        reader = asyncio.create_task(hear(engine, asker.request()))
        for _ in range(rng.choice((0, 1, 5, 50, 500))):
            await asyncio.sleep(0)
        reader.cancel()
        (outcome,) = await asyncio.gather(reader, return_exceptions=True)
        if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
        return "cancelled"
    except ChorusError as error:
        if error.reason == "DRAINING" and not unloads:
            await loadable.wait()
        return error.reason
    finally:
        if unloads:
            loadable.set()


async def fuzz(seed: int, path: str) -> None:
    """Many at a time, over and over; then everything is free, and a whole request goes through."""
    came: Counter[str] = Counter()
    with watching() as batches:
        async with serving(
            smollm2(Path(path)),
            slots=4,
            context_length=CONTEXT,
            kv_tokens=2 * CONTEXT,
            max_queue=16,
            prefill_tokens=24,
            gap_s=0.1,
            speculation=True,
        ) as engine:
            features = engine.models()[0].features

            loadable = asyncio.Event()
            loadable.set()

            async def several(number: int) -> None:
                asker = Asker(seed * 1000 + number, features)
                for _ in range(ROUNDS):
                    came[await one(engine, asker, loadable)] += 1

            await asyncio.gather(*map(several, range(AT_A_TIME)))
            await engine.load("")
            heard = await hear(engine, ask([9] * (CONTEXT - 8), 8))
            assert len(heard.ids()) == 8
            (load,) = engine.load_report()
            assert (load.slots_used, load.queued) == (0, 0)
            await engine.forget_cache()
            await hear(engine, ask([9], 1))
            await engine.forget_cache()
            batches.contexts = [context for context in batches.contexts if context._handle]
            assert batches.sequences_left() == {}
    assert sum(came.values()) == ROUNDS * AT_A_TIME
    assert came.keys() <= OUTCOMES | REFUSALS, came
    assert came.keys() >= OUTCOMES | {"INVALID_REQUEST"}, came
    print("survived", dict(came))


@pytest.mark.parametrize("seed", [1, 2])
async def test_nothing_aborts_the_process(seed: int, shallow: ModelSource) -> None:
    call = f"fuzz({seed}, {str(shallow.path)!r})"
    program = f"import asyncio; from tests.engine.test_acceptance_fuzz import fuzz; asyncio.run({call})"
    result = subprocess.run(  # noqa: ASYNC221 - nothing else runs meanwhile
        [sys.executable, "-X", "faulthandler", "-c", program],
        capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert "survived" in result.stdout
