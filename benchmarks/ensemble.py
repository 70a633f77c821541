"""An ensemble ends with its slowest member: how much later than that member does the caller have everything?

    make bench ONLY=ensemble

A registry, a coordinator and three runners with the fake engine at three speeds, each a process of its own, over mutual
TLS. Votes of three members, one after the other; each member's finish and the ensemble's end are taken at the client,
from the moment at which it asked. Aggregation by a model would come on top; a vote has none.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from figures import Bar, percentile, verdict
from meshes import Mesh, Shape
from processes import BenchmarkError, machine, processes_in, say

from chorus.client import MemberEvent, MeshClient, Verdict, ensemble_spec
from chorus.core.ensemble.records import MemberState
from chorus.core.generation import Finished, GenerationRequest, StopConditions, TextPrompt
from chorus.testing.service import TOKENS_PER_SECOND_ENV

_SPEEDS = {"alpha": 120, "beta": 80, "gamma": 50}  # tokens a second
_TOKENS = 60
_BAR = 1.15


async def one(client: MeshClient, number: int) -> tuple[float, float]:
    """Seconds until the slowest member had finished, and until the end of the stream."""
    request = GenerationRequest("", TextPrompt(f"question {number}"), stop=StopConditions(max_tokens=_TOKENS))
    began, finishes, whole = time.monotonic(), dict[str, float](), False
    async with client.ensemble(request, ensemble_spec("vote", ("fake-1b*3",), quorum=3)) as events:
        async for event in events:
            if isinstance(event, MemberEvent) and isinstance(event.event, Finished):
                finishes[event.member_id] = time.monotonic() - began
            elif isinstance(event, Verdict):
                whole = event.count(MemberState.ANSWERED) == 3
    if not whole or len(finishes) != 3:
        raise BenchmarkError(f"ensemble {number} has not three answers")
    return max(finishes.values()), time.monotonic() - began


async def run(count: int) -> int:
    """Measures and prints; returns an exit status."""
    speeds = ", ".join(f"{name} {speed}" for name, speed in _SPEEDS.items())
    print(f"{machine()}; {count} votes of three members, {_TOKENS} tokens each, at {speeds} tokens/s.\n")
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as folder, processes_in(Path(folder)) as processes:
        own = {name: {TOKENS_PER_SECOND_ENV: str(speed)} for name, speed in _SPEEDS.items()}
        mesh = Mesh(processes, Shape(tuple(_SPEEDS), own=own))
        client = mesh.client(timeout_s=60.0)
        try:
            await mesh.until_all_serve()
            await one(client, 0)
            say(f"{count} ensembles")
            measured = [await one(client, number) for number in range(1, count + 1)]
        finally:
            await client.aclose()
    ratios = [end / slowest for slowest, end in measured]
    after_ms = [1000 * (end - slowest) for slowest, end in measured]
    print("| | p50 | p95 | largest |\n|---|---|---|---|")
    for name, values, form in (
        ("slowest member's finish, s", [slowest for slowest, _ in measured], ".3f"),
        ("end after it, ms", after_ms, ".1f"),
        ("ratio", ratios, ".4f"),
    ):
        cells = [percentile(values, 0.5), percentile(values, 0.95), max(values)]
        print(f"| {name} | " + " | ".join(f"{cell:{form}}" for cell in cells) + " |")
    worst = max(ratios)
    return verdict(
        [Bar(f"every ensemble ended within {worst:.3f}x of its slowest member, at most {_BAR}x", worst <= _BAR)]
    )


def main() -> int:
    """Reads the command line; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="ensembles (20)")
    try:
        return asyncio.run(run(parser.parse_args().count))
    except BenchmarkError as error:
        print(f"ensemble: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
