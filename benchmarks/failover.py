"""Runners, coordinators and registries that die, freeze or are cut off in the middle of streams: is a token lost,
doubled or wrong, and how long comes nothing?

    make bench ONLY=failover
    .venv/bin/python benchmarks/failover.py --faults kill,coordinator --quick

Three runners, two registries and two coordinators, each a process of its own, over mutual TLS. The runners' engine is
the fake one, whose every token tells its place in the answer, so what arrives can be checked exactly. Streams run all
the time, by the Python client and by a plain Node.js client, started anew as they end. At random moments:

kill         a runner with tokens on their way is killed (kill -9) and started anew
freeze       one is stopped (SIGSTOP) for 4 s and continued, when it must not be heard again
partition    one is cut off from everybody for 4 s: packets vanish, connections stay open
coordinator  a coordinator is killed: the Python client goes on at the other one by itself, the Node.js client sends
             the ids it has to the other one
registry     a registry is killed, which no stream may notice
remote       a server with OpenAI's API behind a runner, which tells no token ids, is killed: its streams end with
             UNAVAILABLE and the number of tokens delivered, or go on from text where the caller allowed it

With --model smollm2 the runners have a real model; its greedy tokens are checked by forcing them on a clean runner.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from figures import Bar, percentile, verdict
from forced import check_forced
from meshes import Mesh, Shape
from oracle import Gap, Tally
from processes import BenchmarkError, machine, processes_in, say
from remote_faults import remote_killed
from streams import NodeStreams, PythonStreams, Streams, node_missing

from chorus.testing.service import TOKENS_PER_SECOND_ENV
from faults import Faults, Ways

TOKENS_PER_SECOND = 25
SHAPE = {"registries": ("registry", "registry-b"), "coordinators": ("coordinator", "coordinator-b")}
ENVIRON = {TOKENS_PER_SECOND_ENV: str(TOKENS_PER_SECOND), "CHORUS_RUNNER__SLOTS": "24"}
# How often each happens, and how long a gap may be at the 99th percentile (prefill is nothing to the fake engine).
_TIMES = {"kill": 200, "freeze": 20, "partition": 20, "coordinator": 20, "registry": 10, "remote": 20}
_QUICK = {"kill": 10, "freeze": 2, "partition": 2, "coordinator": 4, "registry": 2, "remote": 4}
_BARS_S = {"kill": 0.5, "freeze": 3.0, "partition": 3.0, "coordinator": 1.0, "registry": None}


@dataclass
class Phase:
    """One kind of fault, and the gaps that it made."""

    kind: str
    times: int
    began: float
    ended: float
    gaps: list[Gap] = field(default_factory=list)

    def sort(self, tallies: Iterable[Tally]) -> None:
        """Finds its gaps; a client may tell of one when its stream ends."""
        self.gaps = [gap for tally in tallies for gap in tally.gaps if self.began <= gap.at < self.ended]


async def phases(mesh: Mesh, faults: Faults, kinds: dict[str, int], draw: random.Random) -> list[Phase]:
    """So many faults of each kind, one after the other."""
    found = []
    for kind, times in kinds.items():
        began = time.time()
        for number in range(1, times + 1):
            await mesh.until_all_serve()
            await asyncio.sleep(draw.uniform(0.2, 1.2))
            victim = await faults.kinds[kind]()
            say(f"{kind} {number}/{times}: {victim}")
        await mesh.until_all_serve()
        found.append(Phase(kind, times, began, time.time()))
    return found


async def mesh_faults(
    kinds: dict[str, int], python: int, node: int, draw: random.Random
) -> tuple[list[Phase], dict[str, Tally]]:
    """Runs the mesh and the streams, and all faults that it has."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="chorus-bench-"))
        processes = stack.enter_context(processes_in(Path(folder)))
        ways = Ways()
        shape = Shape(**SHAPE, environ=ENVIRON)
        own = await ways.lay(shape, stack)
        mesh = Mesh(processes, Shape(**SHAPE, environ=ENVIRON, own=own))
        ways.lead(mesh)
        await mesh.until_all_serve()
        client = await stack.enter_async_context(mesh.client())
        streams: dict[str, Streams] = {"python": PythonStreams(client, python)}
        if node:
            streams["node"] = await NodeStreams.start(mesh, node)
        faults = Faults(mesh, ways, streams["python"].busy, draw)
        found = await phases(mesh, faults, kinds, draw)
        for each in streams.values():
            await each.stop()
        for phase in found:
            phase.sort([each.tally for each in streams.values()])
        return found, {name: each.tally for name, each in streams.items()}


def report(found: Sequence[Phase], tallies: dict[str, Tally]) -> list[Bar]:
    """Prints the tables; returns the bars."""
    print(
        "\n| fault | times | client | streams carried over | gap p50, ms | p99 | longest |\n"
        "|---|---|---|---|---|---|---|"
    )
    bars = []
    for phase in found:
        lost = "coordinator" if phase.kind == "coordinator" else "runner"
        for client in tallies:
            seen = [gap.seconds for gap in phase.gaps if gap.client == client and gap.lost == lost]
            figures = " | ".join(
                f"{1000 * percentile(seen, share):,.0f}" if seen else "-" for share in (0.5, 0.99, 1.0)
            )
            print(f"| {phase.kind} | {phase.times} | {client} | {len(seen)} | {figures} |")
        bars += _gap_bars(phase, lost)
    for client, tally in tallies.items():
        usual = f"{1000 / TOKENS_PER_SECOND:.0f} ms between two tokens otherwise"
        print(f"\n{client}: {tally.streams} whole answers, {tally.tokens} tokens; {usual}.")
        for why in tally.told[:5]:
            print(f"  {why}")
        troubles = tally.troubles
        bars.append(Bar(f"{client}: nothing lost, doubled, wrong or failed: {troubles or 'nothing'}", not troubles))
        bars.append(Bar(f"{client}: some answers", tally.streams > 0))
    return bars


def _gap_bars(phase: Phase, lost: str) -> list[Bar]:
    limit = _BARS_S[phase.kind]
    seen = [gap.seconds for gap in phase.gaps if gap.lost == lost]
    if limit is None:
        return [Bar(f"no stream noticed that a registry was killed: {len(phase.gaps)} did", not phase.gaps)]
    if not seen:
        return [Bar(f"a {phase.kind} hit no stream, so nothing was shown", False)]
    p99 = percentile(seen, 0.99)
    return [Bar(f"gap p99 after a {phase.kind} at most {limit * 1000:,.0f} ms: {p99 * 1000:,.0f}", p99 <= limit)]


async def run(chosen: argparse.Namespace) -> int:
    """Runs it all and prints it; returns an exit status."""
    times = (_QUICK if chosen.quick else _TIMES) | ({"kill": chosen.kills} if chosen.kills else {})
    kinds = {kind: times[kind] for kind in chosen.faults}
    draw = random.Random(chosen.seed)
    why = "" if chosen.no_node else node_missing()
    if chosen.model:
        print(f"{machine()}; 3 runners with a real model.")
        return verdict(await check_forced(chosen.kills or (10 if chosen.quick else 40), draw))
    print(f"{machine()}; 3 runners, {chosen.streams} streams of the Python client, {chosen.node_streams} of Node.js.")
    if why:
        print(f"\n!!! NO NODE.JS CLIENT IN THIS RUN: {why}")
    bars: list[Bar] = [Bar(f"a Node.js client took part ({why})", False)] if why else []
    in_mesh = {kind: count for kind, count in kinds.items() if kind != "remote"}
    if in_mesh:
        node = 0 if why or chosen.no_node else chosen.node_streams
        bars += report(*await mesh_faults(in_mesh, chosen.streams, node, draw))
    if "remote" in kinds:
        wrong: Counter[str] = await remote_killed(kinds["remote"], draw)
        what = (
            f"{kinds['remote']} remote engines without token ids killed, all ended as they must: {dict(wrong) or 'yes'}"
        )
        bars.append(Bar(what, not wrong))
    return verdict(bars)


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=_kinds, default=tuple(_TIMES), metavar="KIND,...", help="default: all of them")
    parser.add_argument("--kills", type=int, help="how many of the first kind (default: 200, some 15 minutes)")
    parser.add_argument("--streams", type=int, default=12, help="of the Python client (default: %(default)s)")
    parser.add_argument("--node-streams", type=int, default=6, help="of the Node.js client (default: %(default)s)")
    parser.add_argument("--no-node", action="store_true", help="leave the Node.js client out")
    parser.add_argument(
        "--model", choices=["smollm2"], help="a real model, killed in the middle; tokens are forced anew"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few of each: does it run at all?")
    return asyncio.run(run(parser.parse_args()))


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(filter(None, text.split(",")))
    if unknown := set(kinds) - set(_TIMES):
        raise argparse.ArgumentTypeError(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(_TIMES)}")
    return kinds


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit(130)
