"""Serving many streams: a Chorus runner beside llama-server, client to client, in interleaved pairs.

    make bench ONLY=serving ARGS="--quick"

Both run the same llama.cpp (the server is linked to the wheel's own libraries) on the same model with the same threads,
flash attention and KV memory. They stay up for the whole run and are asked in turn, A B B A, the same prompts within a
pair, no prompt twice:

  tokens/s   N streams at once, from the first request sent to the last token received; any end of text is ignored
  gap        between two messages of one of these streams; each token is a message
  TTFT       requests of few tokens, N under way at a time: from sending one to its first token

The runner is asked over mutual TLS gRPC, llama-server over plaintext HTTP, both by clients that read the socket and
count messages (a grpc.aio client would cost twice as much a token, on the cores that decode). "greedy" is temperature
0; "sampled" the chain top-k 40, top-p 0.95, min-p 0.05, temperature 0.8 in this order, penalties off, fixed seeds.
llama-server is run with unified or split KV memory, whichever was faster in a short run before.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clients import Ask, Stream
from processes import BenchmarkError, Processes, machine, processes_in, say
from servers import (
    Server,
    Shape,
    Wrapper,
    cores,
    default_model,
    llama_server_program,
    start_llama_server,
    started_runner,
)
from serving_report import LLAMA_SERVER, RUNNER, WRAPPER, Cell, Measured, Results, report

_WORDS = (
    "river mountain engine copper lantern harbour winter signal garden paper orchard thunder bridge velvet compass "
    "meadow harvest shadow ladder marble window kettle anchor feather candle tunnel basket pepper saddle whistle"
)
_TTFT_TOKENS = 3
_TTFT_TOTAL = 500
_PART_LIMIT_S = 300.0
_ENOUGH_ROUNDS = 10


@dataclass(frozen=True)
class Plan:
    """What is run: so many rounds over these cells, and TTFT requests a round."""

    cells: tuple[Cell, ...]
    rounds: int
    requests: int


def prompts(draw: random.Random, count: int) -> list[str]:
    """Prompts of about 30 tokens that share no beginning, so that no cache of either server helps."""
    return [f"{' '.join(draw.choices(_WORDS.split(), k=24))}. Once upon a time" for _ in range(count)]


async def together(server: Server, cell: Cell, asked: Sequence[str]) -> list[Stream]:
    """All at once."""
    asks = (Ask(prompt, cell.tokens, cell.sampled, seed) for seed, prompt in enumerate(asked, start=1))
    return await asyncio.gather(*(server.client.generate(ask) for ask in asks))


async def one_after_another(server: Server, cell: Cell, asked: Sequence[str]) -> list[Stream]:
    """As many at a time as the cell has streams; whoever is done takes the next."""
    waiting = [Ask(prompt, _TTFT_TOKENS, cell.sampled, seed) for seed, prompt in enumerate(asked, start=1)]
    streams = []

    async def caller() -> None:
        while waiting:
            streams.append(await server.client.generate(waiting.pop()))

    await asyncio.gather(*(caller() for _ in range(cell.streams)))
    return streams


async def measure(server: Server, other: Server, cell: Cell, asked: Sequence[str], found: Measured) -> None:
    """One server's half of a pair. Raises `BenchmarkError` where it falls silent or answers too little."""
    gc.collect()  # none of the last part's rubbish in this one's time
    began = time.perf_counter()
    client, busy, idle = time.process_time(), server.process.cpu_s(), other.process.cpu_s()
    try:
        async with asyncio.timeout(_PART_LIMIT_S):
            streams = await together(server, cell, asked[: cell.streams])
            callers = await one_after_another(server, cell, asked[cell.streams :])
    except OSError as error:  # TimeoutError is one
        server.process.check()
        raise BenchmarkError(
            f"{server.process.name} at {cell}: {str(error) or f'no answer within {_PART_LIMIT_S:.0f} s'}.\n"
            f"{server.process.last_words()}"
        ) from error
    found.client_cpu_s += time.process_time() - client
    found.server_cpu_s += server.process.cpu_s() - busy
    found.idle_cpu_s += other.process.cpu_s() - idle
    found.wall_s += time.perf_counter() - began
    tokens = sum(stream.tokens for stream in streams)
    if tokens != cell.streams * cell.tokens or any(not stream.arrivals for stream in callers):
        raise BenchmarkError(
            f"{server.process.name} at {cell}: {tokens} tokens where all were to be {cell.tokens} long"
        )
    took = max(stream.arrivals[-1] for stream in streams) - min(stream.sent for stream in streams)
    found.rates.append(tokens / took)
    found.tokens += tokens + sum(stream.tokens for stream in callers)
    found.gaps_s += [gap for stream in streams for gap in stream.gaps_s]
    found.firsts_s += [stream.first_s for stream in callers]


async def measure_wrapper(wrapper: Wrapper, cell: Cell, asked: Sequence[str], found: Measured) -> None:
    """The same of the wrapper, which serves one at a time and has no client."""
    async with asyncio.timeout(_PART_LIMIT_S):
        answer = await wrapper.generate(Ask(asked[0], cell.tokens, cell.sampled))
        found.rates.append(cell.tokens / answer["total_s"])
        found.gaps_s += answer["gaps_s"]
        for prompt in asked[1:]:
            found.firsts_s.append((await wrapper.generate(Ask(prompt, _TTFT_TOKENS, cell.sampled)))["first_s"])


async def better_llama_server(processes: Processes, shape: Shape, program: Path) -> tuple[Server, str]:
    """llama-server with the faster kind of KV memory, running, and what the other one did."""
    cells = [Cell(1, sampled=False), Cell(min(16, shape.slots), sampled=False)]
    draw = random.Random(0)
    servers, speeds = {}, {}
    for unified in (True, False):
        servers[unified] = await start_llama_server(processes, shape, program, unified=unified)
    for unified in (True, False):
        await together(servers[unified], cells[1], prompts(draw, cells[1].streams))
    rates: dict[bool, list[float]] = {True: [], False: []}
    for turn in (True, False, False, True):
        for cell in cells:
            found = Measured()
            await measure(servers[turn], servers[not turn], cell, prompts(draw, cell.streams), found)
            rates[turn] += found.rates
    speeds = {unified: math.exp(sum(map(math.log, values)) / len(values)) for unified, values in rates.items()}
    best = speeds[True] >= speeds[False]
    processes.end(servers[not best].process)
    name = {True: "unified", False: "split"}
    text = f"KV {name[best]}: {speeds[best]:.0f} tokens/s in a run before, {name[not best]} {speeds[not best]:.0f}"
    return servers[best], text


async def run(plan: Plan, shape: Shape) -> int:
    """Runs it all and prints it; returns an exit status."""
    program = llama_server_program()
    found: Results = defaultdict(Measured)
    about = machine()
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as folder, processes_in(Path(folder)) as processes:
        theirs, kind = await better_llama_server(processes, shape, program)
        say(kind)
        # before the channel: gRPC's threads and a fork don't go well together
        wrapper = Wrapper(processes, shape) if any(cell.streams == 1 for cell in plan.cells) else None
        async with started_runner(processes, shape) as ours:
            servers = {LLAMA_SERVER: theirs, RUNNER: ours}
            await rounds(plan, servers, wrapper, found, processes)
            peaks = {name: server.process.peak_bytes() for name, server in servers.items()}
            if wrapper is not None:
                peaks[WRAPPER] = wrapper.process.peak_bytes()
    print(
        f"{about}. {shape.model.name}, {shape.threads} threads, {shape.slots} slots of {shape.context_length} tokens; "
        f"llama-server's {kind}. {plan.rounds} interleaved pairs a cell.\n"
    )
    status = report(plan.cells, found, peaks)
    if plan.rounds < _ENOUGH_ROUNDS:
        print(f"\n{plan.rounds} rounds are too few to judge by; it takes {_ENOUGH_ROUNDS}.")
        return 0
    return status


async def rounds(
    plan: Plan, servers: dict[str, Server], wrapper: Wrapper | None, found: Results, processes: Processes
) -> None:
    """Every cell once a round; who goes first changes from round to round and from cell to cell."""
    draw = random.Random(1)
    largest = max(plan.cells)
    for server in servers.values():  # a warm-up
        await together(server, largest, prompts(draw, largest.streams))
    began = time.monotonic()
    for number in range(plan.rounds):
        for place, cell in enumerate(plan.cells):
            asked = prompts(draw, cell.streams + plan.requests)
            order = (LLAMA_SERVER, RUNNER) if (number + place) % 2 == 0 else (RUNNER, LLAMA_SERVER)
            for name in order:
                other = servers[RUNNER if name == LLAMA_SERVER else LLAMA_SERVER]
                await measure(servers[name], other, cell, asked, found[cell, name])
            if wrapper is not None and cell.streams == 1:
                await measure_wrapper(wrapper, cell, asked, found[cell, WRAPPER])
            processes.check()
            ratio = found[cell, RUNNER].rates[-1] / found[cell, LLAMA_SERVER].rates[-1]
            say(f"round {number + 1}/{plan.rounds}, {time.monotonic() - began:4.0f} s: {cell!s:<11} {ratio:.2f}")


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file (default: SmolLM2, which a package carries)")
    parser.add_argument("--streams", default="1,4,8,16,32", help="the cells' numbers of streams (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="pairs a cell (default: %(default)s, some 20 minutes)")
    parser.add_argument("--threads", type=int, default=cores(), help="threads that decode (default: %(default)s)")
    parser.add_argument("--context-length", type=int, default=512, help="tokens of each slot (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two rounds of two cells: does it run at all?")
    chosen = parser.parse_args()
    streams = sorted({int(count) for count in chosen.streams.split(",")})
    every = tuple(Cell(count, sampled) for count in streams for sampled in (False, True))
    number = 2 if chosen.quick else max(1, chosen.rounds)
    cells = (every[0], Cell(min(16, streams[-1]), sampled=True)) if chosen.quick else every
    plan = Plan(cells, number, 50 if chosen.quick else max(50, math.ceil(_TTFT_TOTAL / number)))
    model = (chosen.model or default_model()).resolve()
    shape = Shape(model, max(cell.streams for cell in every), chosen.context_length, chosen.threads)
    return asyncio.run(run(plan, shape))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit(130)
