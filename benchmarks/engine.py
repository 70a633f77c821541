"""What the llama.cpp engine itself costs, in-process: no gRPC, no TLS.

    make bench ONLY=engine ARGS="--rounds 3"

"own" is the CPU time of every thread of this process outside of llama_decode: the engine's thread between two decodes
(sampling, text, scheduling), the event loop, and whoever reads the events here. It is told as a share of the time that
passed or, where that is more, of itself and the engine thread's CPU time in decodes: on a busy machine much time passes
that nobody here has. CPU time of ggml's own threads is not in it; what they burn outside of a decode, spinning until
the next one, is told beside it. Each figure is the median of its rounds; what is compared is interleaved.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import uvloop
from figures import Bar, geometric_mean, verdict
from processes import BenchmarkError, machine, say
from servers import cores, default_model, gemma_model

from chorus.core.fleet.records import Artifact, Feature, Tier
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    GenerationRequest,
    Sampling,
    StopConditions,
    TextPrompt,
    TokenDelta,
)
from chorus.engine.llama import LlamaEngine, LlamaSettings, ModelSource
from chorus.engine.llama.context import Context

GREEDY, DEFAULT, JSON = "greedy", "default chain", "JSON Schema"
_MOST = 0.03
_JSON_LEAST = 0.8
_RUN_LIMIT_S = 180.0
# No answer meets it within a run: free streams and these are all as long as they may be.
_SCHEMA = {
    "type": "array",
    "minItems": 200,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "mood": {"enum": ["glad", "sad", "sleepy"]},
            "friends": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        },
        "required": ["name", "age", "mood", "friends"],
        "additionalProperties": False,
    },
}
_STORY = GenerationRequest("", TextPrompt(""), stop=StopConditions(ignore_eos=True))
KINDS: dict[str, GenerationRequest] = {
    GREEDY: replace(_STORY, sampling=Sampling(temperature=0.0)),
    DEFAULT: replace(_STORY, sampling=Sampling(seed=1)),
    "logprobs 5": replace(_STORY, sampling=Sampling(seed=1), logprobs=5),
    "top-p without top-k": replace(_STORY, sampling=Sampling(seed=1, top_k=0, min_p=0.0)),
    "typical 0.9": replace(_STORY, sampling=Sampling(seed=1, typical_p=0.9)),
    "penalties": replace(_STORY, sampling=Sampling(seed=1, repetition_penalty=1.1, frequency_penalty=0.2)),
    JSON: GenerationRequest(
        "",
        TextPrompt(""),
        sampling=Sampling(seed=1),
        constraint=Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(_SCHEMA)),
    ),
}
_NEEDS = {JSON: Feature.JSON_SCHEMA, "typical 0.9": Feature.TYPICAL, "penalties": Feature.PENALTIES}


@dataclass
class Spent:
    """CPU seconds: of the whole process, inside of llama_decode by the engine's thread, and ggml's threads'."""

    process: float
    decode: float
    ggml: float
    ggml_in_decode: float


class DecodeClock:
    """Takes the CPU time spent inside of decode and the wait for its logits, by thread."""

    def __init__(self) -> None:
        self._others: set[int] = set()
        self._ggml: list[int] = []
        self._decode = self._ggml_in_decode = 0.0
        for name in ("decode", "logits"):
            setattr(Context, name, self._timed(getattr(Context, name)))

    def _timed(self, call: Any) -> Any:
        def timed(context: Context, count: int) -> Any:
            began, ggml = time.thread_time(), self._ggml_s()
            try:
                return call(context, count)
            finally:
                self._decode += time.thread_time() - began
                self._ggml_in_decode += self._ggml_s() - ggml

        return timed

    def _ggml_s(self) -> float:
        return sum([time.clock_gettime(clock) for clock in self._ggml])

    def new_engine(self) -> None:
        """Before an engine starts: the threads that are here now are not ggml's."""
        self._others, self._ggml = set(_threads()), []

    def find_threads(self) -> None:
        """After an engine's first decode, and before anything else has threads: those that came with it are ggml's."""
        python = {thread.native_id for thread in threading.enumerate()}
        self._ggml = [_cpu_clock(thread) for thread in _threads() if thread not in python | self._others]

    def read(self) -> Spent:
        """What was spent so far."""
        return Spent(time.process_time(), self._decode, self._ggml_s(), self._ggml_in_decode)


def _threads() -> Iterable[int]:
    return [int(task.name) for task in Path("/proc/self/task").iterdir()]


def _cpu_clock(thread: int) -> int:
    """Linux' number of the clock that tells a thread's CPU time (see clock_getres(2) and pthread_getcpuclockid(3))."""
    return (~thread << 3) | 6


@dataclass
class Measured:
    """One round of one cell: tokens a second, own cost as a share and in microseconds a token, and ggml's spinning."""

    rate: float
    own: float
    own_us: float
    spinning: float


async def read(engine: LlamaEngine, request: GenerationRequest, number: int, tokens: int) -> int:
    """Reads one stream to its end; returns its tokens."""
    request = replace(
        request,
        prompt=TextPrompt(f"Story number {number}: once upon a time"),
        stop=replace(request.stop, max_tokens=tokens),
    )
    return sum([len(event.token_ids) async for event in engine.generate(request) if isinstance(event, TokenDelta)])


async def measure(engine: LlamaEngine, clock: DecodeClock, kind: str, streams: int, tokens: int) -> Measured:
    """So many streams of that kind at once."""
    before, began = clock.read(), time.perf_counter()
    async with asyncio.timeout(_RUN_LIMIT_S):
        drawn = sum(await asyncio.gather(*(read(engine, KINDS[kind], n, tokens) for n in range(streams))))
    took, after = time.perf_counter() - began, clock.read()
    ggml = after.ggml - before.ggml
    decode = after.decode - before.decode
    own = (after.process - before.process) - decode - ggml
    spinning = ggml - (after.ggml_in_decode - before.ggml_in_decode)
    return Measured(drawn / took, own / min(took, own + decode), own / drawn * 1e6, spinning / took)


Results = dict[tuple[str, int], list[Measured]]


def source_of(path: Path) -> ModelSource:
    """A file as the engine wants it described; nothing here asks for more than its name."""
    return ModelSource(Artifact(path.stem, path.name, "", path.stat().st_size, "", 0, 0, "", Tier.MICRO), path)


async def measure_model(path: Path, kinds: Iterable[str], chosen: argparse.Namespace, clock: DecodeClock) -> Results:
    """Every kind that the engine can do, at every number of streams, in interleaved rounds."""
    counts = [int(count) for count in chosen.streams.split(",")]
    settings = LlamaSettings(slots=max(counts), context_length=512, threads=chosen.threads)
    clock.new_engine()
    engine = LlamaEngine([source_of(path)], settings)
    await engine.start()
    found: Results = defaultdict(list)
    try:
        await engine.load("")
        (status,) = engine.models()
        able = [kind for kind in kinds if kind not in _NEEDS or _NEEDS[kind] in status.features]
        await read(engine, KINDS[GREEDY], 0, 8)
        clock.find_threads()
        for number, kind in enumerate(able):  # a warm-up
            await read(engine, KINDS[kind], number, 8)
        for number in range(chosen.rounds):
            for count in counts:
                for kind in able if number % 2 == 0 else reversed(able):
                    found[kind, count].append(await measure(engine, clock, kind, count, chosen.tokens))
                    last = found[kind, count][-1]
                    say(f"round {number + 1}/{chosen.rounds}: {path.name}, {count} x {kind}: {last.rate:.0f} tokens/s, "
                        f"own {last.own:.1%}")  # fmt: skip
    finally:
        await engine.stop()
    return found


def print_model(path: Path, found: Results) -> None:
    """One table a model."""
    print(f"\n| {path.name} | streams | tokens/s | own cost | own, us a token | ggml's threads spinning |")
    print("|---|---|---|---|---|---|")
    for (kind, streams), rounds in sorted(found.items(), key=lambda item: (list(KINDS).index(item[0][0]), item[0][1])):
        names = ("rate", "own", "own_us", "spinning")
        rate, own, each, spinning = (statistics.median(getattr(one, name) for one in rounds) for name in names)
        print(f"| {kind} | {streams} | {rate:.1f} | {own:.2%} | {each:,.0f} | {spinning:.2%} |")


def bars(found: Results) -> list[Bar]:
    """What SmolLM2's figures must show."""
    must = []
    for kind in (GREEDY, DEFAULT):
        for streams in (1, 16):
            if (kind, streams) in found:
                own = statistics.median(one.own for one in found[kind, streams])
                must.append(Bar(f"own cost of {streams} x {kind} at most {_MOST:.0%}: {own:.2%}", own <= _MOST))
    if (JSON, 16) in found:
        pairs = zip(found[JSON, 16], found[DEFAULT, 16], strict=True)
        mean = geometric_mean([[constrained.rate / free.rate for constrained, free in pairs]])
        must.append(Bar(f"16 JSON streams at least {_JSON_LEAST} of 16 free ones: {mean}", mean.value >= _JSON_LEAST))
    return must


async def run(chosen: argparse.Namespace) -> int:
    """Measures and prints; returns an exit status."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    clock = DecodeClock()
    print(f"{machine()}; {chosen.threads} threads, {chosen.tokens} tokens a stream, {chosen.rounds} rounds.")
    path = chosen.model or default_model()
    found = await measure_model(path, KINDS, chosen, clock)
    print_model(path, found)
    gemma = gemma_model() if chosen.model is None else None
    if gemma is not None:
        print_model(gemma, await measure_model(gemma, (GREEDY, DEFAULT, JSON), chosen, clock))
    return verdict(bars(found)) if chosen.model is None else 0


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file, without bars (default: SmolLM2 and Gemma 3 270M)")
    parser.add_argument("--streams", default="1,16", help="numbers of streams (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each stream (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=cores(), help="threads that decode (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round: does it run at all?")
    chosen = parser.parse_args()
    chosen.rounds = 1 if chosen.quick else max(1, chosen.rounds)
    return uvloop.run(run(chosen))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit(130)
