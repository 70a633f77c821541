"""Runs a dataset through strategies of a mesh, by its Python client alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from chorus.client import MeshClient, ensemble_spec
from chorus.core.ensemble.records import EnsembleSpec, Strategy
from chorus.core.errors import ChorusError, InvalidRequestError
from chorus.core.generation import (
    Conversation,
    GenerationRequest,
    Message,
    MessageRole,
    PromptScored,
    Sampling,
    StopConditions,
    TextPart,
    TextPrompt,
)
from chorus.eval.dataset import Item
from chorus.eval.scoring import Scoring, continuation, is_right, judging_prompt, likeliest, said_yes

_JUDGE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Contender:
    """What is measured: a strategy with its members, by the name that reports call it."""

    name: str
    ensemble: EnsembleSpec

    @classmethod
    def parse(cls, text: str) -> Contender:
        """`STRATEGY`, or `STRATEGY:MODEL,MODEL*SAMPLES`. Raises `InvalidRequestError`."""
        strategy, _, members = text.partition(":")
        try:
            names = tuple(name.strip() for name in members.split(",") if name.strip())
            return cls(text, ensemble_spec(strategy.strip().lower(), names))
        except ValueError as error:
            known = ", ".join(Strategy)
            raise InvalidRequestError(
                "strategy", f"{text!r}: {error}. It is STRATEGY or STRATEGY:MODEL,MODEL*SAMPLES; there are {known}"
            ) from None


@dataclass(frozen=True, slots=True)
class Settings:
    """How items are asked. `concurrency` requests are under way at a time; `judge_model` is for `Scoring.JUDGE`."""

    scoring: Scoring = Scoring.EXACT
    judge_model: str = ""
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 1
    concurrency: int = 4
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one contender made of one item. `score` is 1 for right and 0 for wrong; of an `error` it is 0, too."""

    contender: str
    item_id: str
    family: str
    text: str = ""
    score: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    cost_micro_usd: int = 0
    confidence: float | None = None
    error: str = ""


async def run(
    mesh: MeshClient, items: Sequence[Item], contenders: Sequence[Contender], settings: Settings
) -> AsyncGenerator[Outcome]:
    """Outcomes as they come. Contenders take turns at each item: a run that is broken off compares like with like.

    An item that fails is an outcome with an error; leaving the iteration ends what is under way.
    """
    waiting = iter([(item, contender) for item in items for contender in contenders])
    running: set[asyncio.Task[Outcome]] = set()
    try:
        while True:
            while len(running) < settings.concurrency and (pair := next(waiting, None)) is not None:
                running.add(asyncio.create_task(_outcome(mesh, *pair, settings)))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)


async def _outcome(mesh: MeshClient, item: Item, contender: Contender, settings: Settings) -> Outcome:
    began = time.monotonic()
    outcome = Outcome(contender.name, item.id, item.family)
    try:
        if settings.scoring is Scoring.CHOICE:
            outcome = await _choose(mesh, item, contender, outcome, settings)
        else:
            outcome = await _answer(mesh, item, contender, outcome, settings)
        taken_s = time.monotonic() - began
        if settings.scoring is Scoring.JUDGE:
            score = await _judged(mesh, item, outcome.text, settings)
        else:
            score = float(is_right(outcome.text, item.answers))
        return replace(outcome, score=score, seconds=taken_s)
    except ChorusError as error:
        return replace(outcome, error=f"{error.reason}: {error.message}", seconds=time.monotonic() - began)


async def _answer(mesh: MeshClient, item: Item, contender: Contender, outcome: Outcome, settings: Settings) -> Outcome:
    ensemble = replace(contender.ensemble, final_only=True)
    whole = await mesh.ensemble(_request(item, settings), ensemble, timeout_s=settings.timeout_s).completion()
    verdict = whole.verdict
    if verdict is None:
        return replace(outcome, text=whole.text, tokens=whole.completion.usage.completion_tokens)
    return replace(
        outcome,
        text=whole.text,
        tokens=sum(member.tokens for member in verdict.members),
        cost_micro_usd=verdict.cost_micro_usd,
        confidence=verdict.confidence,
    )


async def _choose(mesh: MeshClient, item: Item, contender: Contender, outcome: Outcome, settings: Settings) -> Outcome:
    members = contender.ensemble.members
    if not item.choices or item.chat:
        raise InvalidRequestError("dataset", f"item {item.id} needs choices and a raw prompt to be scored by choice")
    if contender.ensemble.strategy is not Strategy.ROUTE or len(members) > 1:
        raise InvalidRequestError(
            "strategy", f"{contender.name} has no log-probabilities of its own; score route:MODEL by choice"
        )
    model = members[0].model if members else ""
    told: list[float] = []
    for choice in item.choices:
        text = choice if item.prompt.endswith((" ", "\n")) else f" {choice}"
        request = replace(
            _request(item, settings),
            model=model,
            prompt=TextPrompt(item.prompt + text),
            prompt_logprobs=0,
            stop=StopConditions(max_tokens=1),
        )
        async with aclosing(mesh.generate(request, timeout_s=settings.timeout_s)) as events:
            told += [continuation(event.tokens, text) async for event in events if isinstance(event, PromptScored)]
    if len(told) != len(item.choices):
        raise InvalidRequestError(
            "strategy", f"{model or 'the default model'} tells no log-probabilities of its prompt"
        )
    return replace(outcome, text=likeliest(item.choices, told))


async def _judged(mesh: MeshClient, item: Item, text: str, settings: Settings) -> float:
    reply = await mesh.complete(
        judging_prompt(item, text),
        model=settings.judge_model,
        max_tokens=_JUDGE_TOKENS,
        temperature=0.0,
        timeout_s=settings.timeout_s,
    )
    return float(said_yes(reply.text))


def _request(item: Item, settings: Settings) -> GenerationRequest:
    prompt = (
        Conversation((Message(MessageRole.USER, (TextPart(item.prompt),)),)) if item.chat else TextPrompt(item.prompt)
    )
    return GenerationRequest(
        model="",
        prompt=prompt,
        sampling=Sampling(temperature=settings.temperature, seed=settings.seed),
        stop=StopConditions(max_tokens=settings.max_tokens, strings=item.stop),
    )
