"""What `judge` and `refine` make of recorded drafts: only the calls of the judge and the aggregator are new.

The strategies are those of a coordinator, folded by its own machine; the calls go to the engine itself. A recording is
a file of JSON lines that goes on where it was broken off, as that of the drafts.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import quality_record

from chorus.core.ensemble.answers import normalise
from chorus.core.ensemble.machine import AskPart, Conclude, Ensemble, Fail, Give, PartAnswered
from chorus.core.ensemble.records import Answer, Member, Strategy
from chorus.core.ensemble.steps import Ask, Task
from chorus.core.ensemble.strategies import STRATEGIES
from chorus.core.ensemble.verdict import judged
from chorus.core.fleet.records import Artifact, Tier
from chorus.core.generation import GenerationRequest, Sampling, StopConditions, TextPrompt, TokenDelta
from chorus.engine.llama import LlamaEngine, LlamaSettings, ModelSource

Line = Mapping[str, Any]
COMPOSED = (Strategy.JUDGE, Strategy.REFINE)
# Twice what a draft may have, and not one line alone: an aggregator likes to write a sentence after a title.
_STOP = StopConditions(max_tokens=24)
_AT_ONCE = 8
_CONTEXT_TOKENS = 1024
_BATCH = 10  # items


@dataclass(frozen=True)
class Model:
    """A model that drafts. Those that chat, which have a chat template, judge and aggregate, as a mesh would choose."""

    path: Path
    chats: bool


def sampled(lines: Sequence[Line], count: int, *, seed: int) -> list[Line]:
    """So many of each family, by chance; families in turns, a few items at a time: their shots are read once."""
    by_family: dict[str, list[Line]] = {}
    for line in lines:
        by_family.setdefault(line["family"], []).append(line)
    # All are shuffled, so that a greater sample holds each smaller one.
    drawn = [Random(f"{seed}/{family}").sample(own, len(own))[:count] for family, own in sorted(by_family.items())]
    return [line for at in range(0, count, _BATCH) for own in drawn for line in own[at : at + _BATCH]]


def draft(line: Line, model: str) -> Answer:
    """A model's likeliest answer to an item, as it was recorded."""
    output = line["outputs"][model]["greedy"]
    logprobs = (*output["logprobs"], output["end"])
    return Answer(model, output["text"], logprobs=logprobs, tokens=len(logprobs), model=model)


def task_of(prompt: str, strategy: Strategy, aggregator: str, models: Mapping[str, Model]) -> Task:
    """The likeliest answer of each model, then what the strategy does with them."""
    return Task(
        GenerationRequest("", TextPrompt(prompt), sampling=Sampling(temperature=0.0), stop=_STOP),
        strategy,
        tuple(Member(name, name) for name in models),
        aggregator,
        with_logprobs=frozenset(models),
        without_chat=frozenset(name for name, model in models.items() if not model.chats),
    )


def read(place: Path) -> dict[str, dict[Strategy, Answer]]:
    """What was answered, by item id and strategy."""
    found: dict[str, dict[Strategy, Answer]] = {}
    for line in quality_record.read(place):
        item_id, strategy, aggregator = line["id"].split("/")
        logprobs = tuple(line["logprobs"] or ()) or None
        answer = Answer(line["from"], line["text"], logprobs=logprobs, model=aggregator)
        found.setdefault(item_id, {})[Strategy(strategy)] = answer
    return found


def mentions(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers is somewhere in a text, which may say whatever else it likes."""
    words = f" {normalise(text)} "
    return any(f" {normalise(answer)} " in words for answer in answers)


def confidence(task: Task, composed: Answer, drafts: Sequence[Answer]) -> float:
    """What the verdict says of a composed answer."""
    of = task.measures.confidence_of
    own = {draft.part_id: replace(draft, confidence=of(draft)) for draft in drafts}
    return judged(task, replace(composed, confidence=of(composed)), [], own, elapsed_s=0.0).confidence


async def record(models: Mapping[str, Model], lines: Sequence[Line], prompts: Mapping[str, str], place: Path) -> None:
    """Records what is lacking, one line for each item, strategy and aggregator, and says how far it is."""
    known = {line["id"] for line in quality_record.read(place)}
    todo = [
        (f"{line['id']}/{strategy}/{aggregator}", line, strategy, aggregator)
        for line in lines
        for strategy in COMPOSED
        for aggregator, model in models.items()
        if model.chats
    ]
    todo = [one for one in todo if one[0] not in known]
    engines = {name: _engine(name, model.path) for name, model in models.items() if model.chats}
    began = time.monotonic()
    try:
        for name, engine in engines.items():
            await engine.start()
            await engine.load(name)
        with place.open("a", encoding="utf-8") as file:
            for at in range(0, len(todo), batch := _BATCH * len(COMPOSED)):
                own = todo[at : at + batch]
                answered = await asyncio.gather(
                    *(
                        _composed(task_of(prompts[line["id"]], strategy, aggregator, models), line, engines)
                        for _, line, strategy, aggregator in own
                    )
                )
                for (line_id, *_), told in zip(own, answered, strict=True):
                    file.write(json.dumps({"id": line_id} | told) + "\n")
                file.flush()
                done, took, cpu = at + len(own), time.monotonic() - began, time.process_time()
                print(f"{done} of {len(todo)} answers, {took / done:.2f} s each, {cpu:.0f} s of CPU", flush=True)
    finally:
        for engine in engines.values():
            await engine.stop()


def _engine(name: str, path: Path) -> LlamaEngine:
    artifact = Artifact(name, path.name, "", path.stat().st_size, "", 0, 0, "", Tier.MICRO)
    return LlamaEngine(
        [ModelSource(artifact, path)], LlamaSettings(slots=_AT_ONCE, context_length=_CONTEXT_TOKENS, threads=1)
    )


async def _composed(task: Task, line: Line, engines: Mapping[str, LlamaEngine]) -> dict[str, Any]:
    """What an ensemble came to: its text, that text's log-probabilities where they are told, and how many calls."""
    ensemble = Ensemble(task, STRATEGIES[task.strategy](task))
    actions, texts, calls = ensemble.begin(0.0), dict[str, Answer](), 0
    while actions:
        action = actions.pop(0)
        match action:
            case AskPart(ask):
                texts[ask.part_id] = answer = (
                    draft(line, ask.member.model) if ask.member else await _asked(ask, engines[ask.request.model])
                )
                calls += ask.member is None
                actions += ensemble.take(PartAnswered(answer), 0.0)
            case Give(part_id) | Conclude(part_id):
                answer = texts[part_id]
                return {"text": answer.text, "logprobs": answer.logprobs, "calls": calls, "from": part_id}
            case Fail(error):
                raise error
            case _:
                raise AssertionError(action)
    raise AssertionError("an ensemble ends with an answer or a failure")


async def _asked(ask: Ask, engine: LlamaEngine) -> Answer:
    text, logprobs = "", list[float]()
    async for event in engine.generate(ask.request):
        if isinstance(event, TokenDelta):
            text += event.text
            logprobs += [round(token.logprob, 4) for token in event.logprobs]
    return Answer(ask.part_id, text, logprobs=tuple(logprobs) or None, tokens=len(logprobs), model=ask.request.model)
