"""A long prompt among running streams: how long they stand still for it, and what it waits for them.

    make bench ONLY=fairness

Eight streams run; then a prompt of 4,000 tokens arrives. Told are the longest gap between two messages of any of the
eight while it is read, and its time to the first token beside the same with nothing else running. A runner and
llama-server stay up for the whole run and take turns, the same prompts for both in a round; no prompt comes twice to
one of them.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from operator import truediv
from pathlib import Path

from clients import Ask, Stream
from figures import Bar, verdict
from processes import BenchmarkError, machine, processes_in, say
from servers import Server, Shape, cores, default_model, llama_server_program, start_llama_server, started_runner

_STREAMS = 8
_RUNNING_TOKENS = 900
_ESTABLISHED = 12  # tokens that each stream has before the prompt comes
_LONGEST_GAP_S = 0.25
_SLOWER = 2.0
_LIMIT_S = 600.0
_WORDS = [
    "time",
    "people",
    "water",
    "day",
    "part",
    "place",
    "work",
    "way",
    "house",
    "world",
    "hand",
    "name",
    "year",
    "line",
]


@dataclass
class Found:
    """One server's rounds, in seconds."""

    alone: list[float] = field(default_factory=list)
    among: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    prompt_tokens: int = 0


async def words_wanted(server: Server, tokens: int) -> int:
    """How many words are so many tokens to this model's tokenizer."""
    probe = " ".join(random.Random(0).choices(_WORDS, k=400))
    counted = (await server.client.generate(Ask(probe, 1))).prompt_tokens
    return int(tokens * 400 / counted)


async def once(server: Server, prompt: str, found: Found) -> None:
    """The prompt alone, then another of its length among running streams."""
    alone = await server.client.generate(Ask(f"Alone. {prompt}", 2))
    found.alone.append(alone.first_s)
    running = [Stream(0.0) for _ in range(_STREAMS)]
    tasks = [
        asyncio.create_task(server.client.generate(Ask(f"Story {number}: once upon a time", _RUNNING_TOKENS), stream))
        for number, stream in enumerate(running)
    ]
    try:
        while min(len(stream.arrivals) for stream in running) < _ESTABLISHED:
            await asyncio.sleep(0.005)
            for task in tasks:
                if task.done():
                    task.result()
        among = await server.client.generate(Ask(f"Among. {prompt}", 2))
        if any(task.done() for task in tasks):
            raise BenchmarkError("the streams ended before the prompt was read; raise _RUNNING_TOKENS")
        await asyncio.sleep(0.5)  # the gap in which its first token came has its end
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(1.0)  # for the server to see it
    found.among.append(among.first_s)
    found.prompt_tokens = among.prompt_tokens
    read = among.arrivals[0]
    found.gaps.append(max(gap for stream in running for gap in gaps_between(stream, among.sent, read)))
    found.before.append(statistics.median(gap for stream in running for gap in gaps_between(stream, 0.0, among.sent)))


def gaps_between(stream: Stream, start: float, end: float) -> list[float]:
    """The gaps of a stream that overlap this time."""
    return [later - earlier for earlier, later in pairwise(stream.arrivals) if later > start and earlier < end]


async def run(model: Path, tokens: int, rounds: int, threads: int) -> int:
    """Measures and prints; returns an exit status."""
    program = llama_server_program()
    shape = Shape(model, _STREAMS + 1, tokens + 1200, threads)
    found = {"llama-server": Found(), "runner": Found()}
    print(f"{machine()}; {model.name}, {threads} threads.\n")
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as folder, processes_in(Path(folder)) as processes:
        theirs = await start_llama_server(processes, shape, program, unified=True)
        async with started_runner(processes, shape) as ours:
            words = await words_wanted(ours, tokens)
            draw = random.Random(1)
            for number in range(rounds):
                prompt = " ".join(draw.choices(_WORDS, k=words))
                pairs = [("llama-server", theirs), ("runner", ours)]
                for name, server in pairs if number % 2 == 0 else reversed(pairs):
                    try:
                        async with asyncio.timeout(_LIMIT_S):
                            await once(server, prompt, found[name])
                    except OSError as error:  # TimeoutError is one
                        server.process.check()
                        why = str(error) or f"no answer within {_LIMIT_S:.0f} s"
                        raise BenchmarkError(f"{name}: {why}.\n{server.process.last_words()}") from error
                    say(f"round {number + 1}/{rounds}: {name}, longest gap {found[name].gaps[-1] * 1000:.0f} ms, "
                        f"TTFT {found[name].among[-1]:.2f} s, alone {found[name].alone[-1]:.2f} s")  # fmt: skip
                processes.check()
    return report(found)


def report(found: dict[str, Found]) -> int:
    """Prints the table and the bars."""
    read = found["runner"].prompt_tokens
    print(f"| {read:,} tokens among {_STREAMS} streams | gap before, ms | longest, ms | TTFT, s | alone, s | ratio |")
    print("|---|---|---|---|---|---|")
    ratios = {}
    for name, one in found.items():
        ratio = ratios[name] = statistics.median(map(truediv, one.among, one.alone))
        among, alone, before = (statistics.median(values) for values in (one.among, one.alone, one.before))
        gaps = f"{before * 1000:.0f} | {max(one.gaps) * 1000:.0f}"
        print(f"| {name} | {gaps} | {among:.2f} | {alone:.2f} | {ratio:.2f} |")
    worst = max(found["runner"].gaps)
    return verdict(
        [
            Bar(f"the streams' longest gap in any round at most {_LONGEST_GAP_S * 1000:.0f} ms: {worst * 1000:.0f} ms",
                worst <= _LONGEST_GAP_S),
            Bar(f"TTFT at most {_SLOWER:.0f} times that of the prompt alone: {ratios['runner']:.2f}",
                ratios["runner"] <= _SLOWER),
        ]
    )  # fmt: skip


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file of 8,192 tokens of context (default: SmolLM2)")
    parser.add_argument("--prompt-tokens", type=int, default=4000, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=cores(), help="threads that decode (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round: does it run at all?")
    chosen = parser.parse_args()
    rounds = 1 if chosen.quick else max(1, chosen.rounds)
    model = (chosen.model or default_model()).resolve()
    return asyncio.run(run(model, chosen.prompt_tokens, rounds, chosen.threads))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit(130)
