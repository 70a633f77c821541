"""Whether guessing ahead by prompt lookup pays: where text is copied, and where there is nothing to copy.

    make bench ONLY=speculation ARGS="--rounds 12"

Two engines in this process, one that guesses and one that doesn't, take turns (A B, B A, ...) on the same prompt with
the same seed; the ratio of tokens a second is taken pair by pair. Bars: >= 1.30 where text is copied, >= 0.97
elsewhere. In-process: no gRPC in these figures.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from pathlib import Path

import structlog
from figures import Bar, geometric_mean, verdict
from processes import machine, say
from servers import cores, default_model

from chorus.core.fleet.records import Artifact, Tier
from chorus.core.generation import GenerationRequest, Sampling, StopConditions, TextPrompt, TokenDelta
from chorus.engine.llama import LlamaEngine, LlamaSettings, ModelSource

_COPIED_LEAST, _ELSEWHERE_LEAST = 1.30, 0.97
_PASSAGE = (
    "The lighthouse keeper wrote down every ship that passed: the grey trawler Maren at six, two barges with coal from "
    "the north, a yacht without a name at noon, and towards evening the mail boat, eleven minutes late, with a broken "
    "lamp and a dog on its bow. Then he trimmed the wick, counted the oil cans, and closed the heavy green book.\n\n"
)
_TOPICS = (
    "a river that forgot its way",
    "bread",
    "the first bicycle in a village",
    "an honest thief",
    "winter",
    "tides",
)


def copying(number: int) -> GenerationRequest:
    prompt = f"Copy {number}.\n\n" + _PASSAGE * 3 + _PASSAGE[:60]
    return GenerationRequest(
        "", TextPrompt(prompt), sampling=Sampling(temperature=0.0), stop=StopConditions(max_tokens=96, ignore_eos=True)
    )


def telling(number: int) -> GenerationRequest:
    prompt = f"Story {number}, about {_TOPICS[number % len(_TOPICS)]}. Once upon a time"
    sampling = Sampling(temperature=0.8, seed=number)
    return GenerationRequest(
        "", TextPrompt(prompt), sampling=sampling, stop=StopConditions(max_tokens=96, ignore_eos=True)
    )


async def decode_rate(engine: LlamaEngine, requests: list[GenerationRequest]) -> tuple[float, list[tuple[int, ...]]]:
    """Tokens a second of all streams together, from the first token that comes to the last; and what was said."""
    first, last, count = 0.0, 0.0, 0

    async def read(request: GenerationRequest) -> tuple[int, ...]:
        nonlocal first, last, count
        ids: list[int] = []
        async for event in engine.generate(request):
            if isinstance(event, TokenDelta):
                last = time.perf_counter()
                first = first or last
                count += len(event.token_ids)
                ids += event.token_ids
        return tuple(ids)

    said = await asyncio.gather(*(read(request) for request in requests))
    return (count - 1) / (last - first), list(said)


async def measure(arguments: argparse.Namespace) -> int:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    path = Path(arguments.model) if arguments.model else default_model()
    artifact = Artifact(path.stem, path.name, "", path.stat().st_size, "", 0, 0, "", Tier.MICRO)
    engines = []
    for guesses in (True, False):
        settings = LlamaSettings(
            slots=4, context_length=1024, threads=arguments.threads, speculation=guesses, prefix_cache=False
        )
        engine = LlamaEngine([ModelSource(artifact, path)], settings)
        await engine.start()
        await engine.load("")
        engines.append(engine)
    print(f"{path.name}, {arguments.threads} threads, {arguments.rounds} pairs a row; {machine()}\n")
    print("| text | streams | with guesses | without | ratio |\n|---|---|---|---|---|")
    bars = []
    for text, make, least in (("copied", copying, _COPIED_LEAST), ("new", telling, _ELSEWHERE_LEAST)):
        for streams in (1, 4):
            rates: list[list[float]] = [[], []]
            for turn in range(arguments.rounds + 1):
                say(f"{text}, {streams} streams, {turn} of {arguments.rounds}")
                requests = [make(turn * streams + number) for number in range(streams)]
                for which in (0, 1) if turn % 2 else (1, 0):
                    rate, _ = await decode_rate(engines[which], requests)
                    if turn:  # the first is for warming up, and for what the engine learns of the machine
                        rates[which].append(rate)
            mean = geometric_mean([[a / b for a, b in zip(*rates, strict=True)]])
            medians = [sorted(figures)[len(figures) // 2] for figures in rates]
            print(f"| {text} | {streams} | {medians[0]:.1f} | {medians[1]:.1f} | {mean} |", flush=True)
            bars.append(
                Bar(f"{text} text, {streams} streams: {mean.value:.2f} where {least:.2f} is asked", mean.value >= least)
            )
    for engine in engines:
        await engine.stop()
    return verdict(bars)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a GGUF file; SmolLM2 by default")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="two pairs a row, for a first look")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds = 2
    sys.exit(asyncio.run(measure(chosen)))
