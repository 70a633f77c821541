"""Texts a second that are embedded: the engine, and beside it llama-cpp-python's own `Llama(embedding=True)`.

    python benchmarks/embedding.py --model all-MiniLM-L6-v2.F16.gguf [--texts 1000] [--rounds 5] [--threads N]

Both get the same texts in one call and the same threads, in turns; a round's ratio is engine to wrapper, and what is
printed is each one's median and the median of the ratios. CPU seconds are those of this process, waiting threads
included. The cosine tells that both made the same vectors.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import structlog

from chorus.core.fleet.records import Artifact, Tier
from chorus.core.generation import EmbeddingRequest
from chorus.engine.llama import LlamaEngine, LlamaSettings, ModelSource

_WORDS = [
    "a",
    "mesh",
    "runs",
    "models",
    "on",
    "unequal",
    "machines",
    "and",
    "a",
    "coordinator",
    "places",
    "each",
    "request",
    "near",
    "memory",
]


def texts_of(count: int) -> tuple[str, ...]:
    """Texts of 5 to 30 words, the same ones every time."""
    rng = random.Random(1)
    return tuple(" ".join(rng.choices(_WORDS, k=rng.randint(5, 30))) for _ in range(count))


def least_cosine(vectors: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    a, b = (np.asarray(rows, np.float64) for rows in (vectors, others))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / lengths).min())


def source_of(path: Path) -> ModelSource:
    return ModelSource(Artifact(path.stem, path.name, "", path.stat().st_size, "", 0, 0, "", Tier.MICRO), path)


async def measure(arguments: argparse.Namespace) -> None:
    from llama_cpp import Llama

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    texts = texts_of(arguments.texts)
    source = source_of(Path(arguments.model))
    settings = LlamaSettings(threads=arguments.threads, context_length=512)
    threads = settings.thread_count()
    engine = LlamaEngine([source], settings)
    await engine.start()
    wrapper = Llama(
        str(source.path),
        embedding=True,
        n_ctx=512,
        n_batch=512,
        n_ubatch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    async def by_engine() -> list[Sequence[float]]:
        _, embeddings = await engine.embed(EmbeddingRequest("", texts))
        return [embedding.values for embedding in embeddings]

    async def by_wrapper() -> list[Sequence[float]]:
        return [*wrapper.embed(list(texts), normalize=True)]

    sides = {"engine": by_engine, "Llama": by_wrapper}
    found = {name: await side() for name, side in sides.items()}  # warm
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            began, used = time.perf_counter(), time.process_time()
            await sides[name]()
            rates[name].append(len(texts) / (time.perf_counter() - began))
            cpu[name].append(time.process_time() - used)
    for name in sides:
        rate, spent = statistics.median(rates[name]), statistics.median(cpu[name])
        print(f"{name:8s} {rate:8.1f} texts/s  {spent:7.2f} CPU s for {len(texts)} texts")
    ratios = [one / other for one, other in zip(rates["engine"], rates["Llama"], strict=True)]
    print(f"ratio    {statistics.median(ratios):8.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"cosine   {least_cosine(found['engine'], found['Llama']):8.6f}  at the least")
    wrapper.close()
    await engine.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="a GGUF file that embeds; tests/engine/minilm.py writes one")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(measure(parser.parse_args()))
