"""A real model's greedy answers over runners that are killed: is every token one that a clean runner would take there?

Numerics differ with batch and hardware, so that where two tokens are about as likely, either may come. So each answer
is forced on an engine that nobody disturbed: given the same tokens before it, the token that came must be the likeliest
one, or less likely than that by no more than a margin.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from figures import Bar, percentile
from meshes import Mesh, Shape
from processes import processes_in, say
from servers import default_model

from chorus.client import AttemptChanged, MeshClient, StartedAt
from chorus.core.errors import ChorusError
from chorus.core.generation import (
    Finished,
    GenerationRequest,
    PromptScored,
    Sampling,
    StopConditions,
    TokenDelta,
    TokenPrompt,
)
from chorus.engine.llama import LlamaEngine, LlamaSettings
from engine import source_of

MARGIN = 0.3
"""Nats of log-probability that a token may be below the likeliest one."""
_TOKENS, _CONTEXT = 96, 512
_STREAMS = 4
_BEGINNINGS = (
    "Once upon a time, in a village by the sea,",
    "The three most important inventions are",
    "def fibonacci(n):\n",
    "Dear Sir or Madam, I am writing to",
    "The recipe begins with two eggs and",
    "In the year 1850 the city of London",
)


@dataclass
class _Answer:
    """One answer over all of its attempts."""

    prompt: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    changes: int = 0
    gaps_s: list[float] = field(default_factory=list)
    counted: int = -1
    runner_id: str = ""
    error: str = ""


async def check_forced(kills: int, draw: random.Random) -> list[Bar]:
    """Kills so many runners under greedy streams of SmolLM2, then forces what came; prints it, returns the bars."""
    path = default_model()
    clean = LlamaEngine([source_of(path)], LlamaSettings(slots=1, context_length=_CONTEXT))
    await clean.start()
    try:
        model = clean.models()[0].artifact.name
        prompts = []
        for text in _BEGINNINGS:
            _, ids = await clean.tokenize(model, text, add_special=True, parse_special=False)
            prompts.append(tuple(ids))
        answers = await _disturbed(path, prompts, kills, draw)
        return await _judge(clean, answers, kills)
    finally:
        await clean.stop()


async def _disturbed(path: Path, prompts: list[tuple[int, ...]], kills: int, draw: random.Random) -> list[_Answer]:
    """Streams all the time, until so many kills have been."""
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as folder, processes_in(Path(folder)) as processes:
        models = Path(folder) / "models" / "bench"
        models.mkdir(parents=True)
        (models / path.name).symlink_to(path)
        environ = {
            "CHORUS_RUNNER__MODELS_DIR": str(models.parent),
            "CHORUS_RUNNER__MODELS": path.name,
            "CHORUS_RUNNER__SLOTS": str(_STREAMS),
            "CHORUS_RUNNER__CONTEXT_LENGTH": str(_CONTEXT),
            "CHORUS_RUNNER__THREADS": "1",
        }
        mesh = Mesh(processes, Shape(runner=None, environ=environ))
        await mesh.until_all_serve()
        async with mesh.client() as client:
            turns, running, done = itertools.cycle(prompts), dict[int, _Answer](), list[_Answer]()
            ending = asyncio.Event()
            tasks = [
                asyncio.create_task(_repeat(client, turns, place, running, done, ending)) for place in range(_STREAMS)
            ]
            for number in range(1, kills + 1):
                await mesh.until_all_serve()
                await asyncio.sleep(draw.uniform(0.5, 2.0))
                busy = sorted({answer.runner_id for answer in running.values() if answer.ids})
                victim = draw.choice(busy or sorted(mesh.shape.runners))
                mesh.kill(victim)
                mesh.start(victim)
                say(f"kill {number}/{kills}: {victim}")
            ending.set()  # what was begun is let end
            await asyncio.gather(*tasks)
        return done


async def _repeat(
    client: MeshClient,
    prompts: itertools.cycle[tuple[int, ...]],
    place: int,
    running: dict[int, _Answer],
    done: list[_Answer],
    ending: asyncio.Event,
) -> None:
    while not ending.is_set():
        answer = running[place] = _Answer(next(prompts))
        try:
            await _stream(client, answer)
        except ChorusError as error:
            answer.error = error.message
        done.append(answer)


async def _stream(client: MeshClient, answer: _Answer) -> None:
    request = GenerationRequest(
        "",
        TokenPrompt(answer.prompt),
        sampling=Sampling(temperature=0.0),
        stop=StopConditions(max_tokens=_TOKENS, ignore_eos=True),
    )
    last, changed = 0.0, False
    async with client.generate(request) as generation:
        async for event in generation:
            if isinstance(event, StartedAt):
                answer.runner_id = event.origin.runner_id
            elif isinstance(event, AttemptChanged):
                answer.runner_id, changed = event.runner_id, True
                answer.changes += 1
            elif isinstance(event, TokenDelta):
                now = time.monotonic()
                if changed:
                    answer.gaps_s.append(now - last)
                last, changed = now, False
                answer.ids += event.token_ids
            elif isinstance(event, Finished):
                answer.counted = event.usage.completion_tokens


async def _judge(clean: LlamaEngine, answers: list[_Answer], kills: int) -> list[Bar]:
    carried = [answer for answer in answers if answer.changes]
    failed = [answer.error for answer in answers if answer.error]
    whole = all(len(answer.ids) == answer.counted == _TOKENS for answer in answers if not answer.error)
    below = [margin for answer in carried if not answer.error for margin in await _margins(clean, answer)]
    likeliest = sum(margin == 0.0 for margin in below)
    gaps_s = [gap for answer in answers for gap in answer.gaps_s]
    print(f"\n{kills} kills of runners with SmolLM2; {len(answers)} answers, {len(carried)} of them carried over.")
    others = f"the others at most {max(below, default=0.0):.3f} nats below it"
    print(f"Forced on a clean engine: {len(below)} tokens, {likeliest} of them the likeliest one there; {others}.")
    if gaps_s:
        print(f"Gaps, prefill included: p50 {percentile(gaps_s, 0.5) * 1e3:,.0f} ms, "
              f"p99 {percentile(gaps_s, 0.99) * 1e3:,.0f} ms.")  # fmt: skip
    return [
        Bar(f"no answer failed: {failed[:3] or 'none'}", not failed),
        Bar(f"every answer has its {_TOKENS} tokens, once each", whole),
        Bar(f"some answers were carried over: {len(carried)}", bool(carried)),
        Bar(f"no forced token is more than {MARGIN} nats below the likeliest: {max(below, default=0.0):.3f}",
            max(below, default=0.0) <= MARGIN),
    ]  # fmt: skip


async def _margins(clean: LlamaEngine, answer: _Answer) -> list[float]:
    """How far each token of an answer is below the likeliest one at its place, in nats."""
    request = GenerationRequest(
        "",
        TokenPrompt((*answer.prompt, *answer.ids)),
        sampling=Sampling(temperature=0.0),
        stop=StopConditions(max_tokens=1, ignore_eos=True),
        prompt_logprobs=1,
    )
    async with aclosing(clean.generate(request)) as events:
        async for event in events:
            if isinstance(event, PromptScored):
                scored = event.tokens[len(answer.prompt) :]
                return [max(0.0, token.alternatives[0].logprob - token.logprob) for token in scored]
    raise AssertionError("prompt log-probabilities were asked for")
