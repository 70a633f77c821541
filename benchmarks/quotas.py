"""How exact quotas are over two coordinators, and what a flood by one key costs the holder of another.

    make bench ONLY=quotas

A registry, a runner with a fake engine and two coordinators that share one store, each a process of its own, over TLS.
First two keys are asked for more than they may, for over a minute, at both coordinators and in three ways: relayed by
the key, relayed by the certificate that shares its limits, and in direct mode. One is limited by requests in a minute,
the other by tokens. What was let through after 50 s must be the limit; and of what began and ended within any 60 s
of the whole run, into the second minute, there must be no more.
Then eight callers of a key without limits ask one request after the other, alone, and while a process of its own floods
both coordinators with another key, as fast as it is refused.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from figures import Bar, percentile, verdict
from meshes import Mesh, Shape
from processes import BenchmarkError, Processes, free_port, machine, processes_in, say

from chorus.client import MeshClient
from chorus.config import Endpoint
from chorus.core.callers import Limits
from chorus.core.errors import ChorusError, QuotaExceededError
from chorus.core.identity import Role

_COORDINATORS = ("one", "two")
_TOKENS_PER_SECOND = 100
_ANSWER, _LONG_ANSWER = 5, 40  # tokens
_REQUESTS, _TOKENS = 150, 6_000  # a minute
_WORKERS = 4  # of each way at each coordinator
_PAUSE_S = 0.05  # of who was refused
_LOOK_S, _END_S = 50.0, 76.0
_CALLERS, _FLOODERS = 8, 16
_EXACT, _SLOWER = 0.01, 1.2


@dataclass
class Let:
    """What was let through: when it began and ended, and what it counts as; and what became of the rest."""

    whole: list[tuple[float, float, int]] = field(default_factory=list)
    refused: int = 0
    other: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        """All that was let through."""
        return sum(amount for _, _, amount in self.whole)

    @property
    def most_in_a_minute(self) -> int:
        """The most that began and ended within some 60 s."""
        starts = [began for began, _, _ in self.whole]
        return max(
            sum(amount for began, ended, amount in self.whole if start <= began and ended <= start + 60)
            for start in starts
        )


class Bench:
    """The mesh, and clients of it in every way."""

    def __init__(self, processes: Processes, *, valkey: Path | None) -> None:
        folder = processes.folder
        self.ports = {name: free_port() for name in _COORDINATORS}
        common = {"CHORUS_CALLERS__DIR": str(folder / "callers")}
        if valkey is not None:
            common |= {"CHORUS_CALLERS__STORE": "valkey", "CHORUS_VALKEY__URL_FILE": str(valkey)}
        own = {name: {"CHORUS_CALLERS__LISTEN": f"127.0.0.1:{port}", **common} for name, port in self.ports.items()}
        environ = {"CHORUS_FAKE_TOKENS_PER_SECOND": str(_TOKENS_PER_SECOND), "CHORUS_RUNNER__SLOTS": "64"}
        shape = Shape(runners=("alpha",), coordinators=_COORDINATORS, own=own, environ=environ)
        self.mesh = Mesh(processes, shape)
        self.folder = folder
        self._root = self.mesh.certify(Role.ADMIN, "root")
        self._clients: list[MeshClient] = []

    async def key(self, name: str, limits: Limits, client: str = "") -> Path:
        """A new key, in a file."""
        for coordinator in _COORDINATORS:  # the last one makes it, the others look
            endpoint = Endpoint("127.0.0.1", self.mesh.port(coordinator), coordinator)
            async with MeshClient([endpoint], identity=self._root) as admin:
                if coordinator == _COORDINATORS[0]:
                    _, text = await admin.keys.create(name, limits=limits, client=client)
                await admin.keys.list()
        path = self.folder / f"{name}.key"
        path.touch(mode=0o600)
        path.write_text(text)
        return path

    def with_key(self, key: Path, *coordinators: str) -> MeshClient:
        """A client of the listeners for those who have one."""
        where = [f"{name}@127.0.0.1:{self.ports[name]}" for name in coordinators or _COORDINATORS]
        client = MeshClient.with_key(*where, api_key_file=key, ca=str(self.ca))
        self._clients.append(client)
        return client

    @property
    def ca(self) -> Path:
        """The authority's file."""
        return next(self.folder.glob("client-*/ca.crt"))

    def all_ways(self, key: Path, client: str) -> list[MeshClient]:
        """By the key, and by the certificate that shares its limits, relayed and direct, at each coordinator."""
        identity = self.mesh.certify(Role.CLIENT, client)
        found = []
        for name in _COORDINATORS:
            endpoint = Endpoint("127.0.0.1", self.mesh.port(name), name)
            found.append(self.with_key(key, name))
            found += [MeshClient([endpoint], identity=identity, direct=direct) for direct in ("never", "always")]
        self._clients += found
        return found

    async def close(self) -> None:
        """Closes every client."""
        for client in self._clients:
            await client.aclose()


async def greedy(client: MeshClient, let: Let, until: float, tokens: int) -> None:
    """Asks for more than there is. Counted are requests that are short, or the tokens of longer ones."""
    number = 0
    while time.monotonic() < until:
        number += 1
        began = time.monotonic()
        try:
            usage = (await client.complete(f"question {number}", max_tokens=tokens)).usage
        except QuotaExceededError:
            let.refused += 1
            await asyncio.sleep(_PAUSE_S)
        except ChorusError as error:
            let.other[error.reason] += 1
            await asyncio.sleep(_PAUSE_S)
        else:
            used = usage.prompt_tokens + usage.completion_tokens
            let.whole.append((began, time.monotonic(), 1 if tokens == _ANSWER else used))


async def exactness(bench: Bench) -> list[Bar]:
    """Both kinds of limits at once."""
    by_requests, by_tokens = Let(), Let()
    one = bench.all_ways(await bench.key("requests", Limits(requests_per_minute=_REQUESTS), client="rita"), "rita")
    two = bench.all_ways(await bench.key("tokens", Limits(tokens_per_minute=_TOKENS), client="theo"), "theo")
    began = time.monotonic()
    asking = [(client, by_requests, _ANSWER) for client in one] + [(client, by_tokens, 2 * _ANSWER) for client in two]
    tasks = [
        asyncio.create_task(greedy(client, let, began + _END_S, tokens))
        for client, let, tokens in asking
        for _ in range(_WORKERS)
    ]
    await asyncio.sleep(_LOOK_S)
    within = [by_requests.count / _REQUESTS, by_tokens.count / _TOKENS]
    await asyncio.gather(*tasks)
    bars = []
    print("| limit | let through in the first minute | the most in any | in all | refused | other errors |")
    print("|---|---|---|---|---|---|")
    kinds = (("requests", _REQUESTS, by_requests), ("tokens", _TOKENS, by_tokens))
    for (what, limit, let), first in zip(kinds, within, strict=True):
        most = let.most_in_a_minute / limit
        other = dict(let.other) or "none"
        shares = f"{first:.4f} | {most:.4f} | {let.count / limit:.2f}"
        print(f"| {limit} {what} a minute | {shares} | {let.refused} | {other} |")
        exact = abs(first - 1) <= _EXACT and most <= 1 + _EXACT
        bars.append(Bar(f"{what}: the limit in the first minute, and no more in any, within 1%", exact))
    return bars


async def latencies(client: MeshClient, seconds: float) -> list[float]:
    """Seconds that answers take to eight callers."""
    found: list[float] = []
    until = time.monotonic() + seconds

    async def ask() -> None:
        while time.monotonic() < until:
            began = time.monotonic()
            await client.complete("a question of mine", max_tokens=_LONG_ANSWER)
            found.append(time.monotonic() - began)

    await asyncio.gather(*(ask() for _ in range(_CALLERS)))
    return found


async def flood(key: Path, ca: Path, where: Sequence[str]) -> None:
    """Asks for ever, as fast as it is refused; a process of its own runs this."""
    client = MeshClient.with_key(*where, api_key_file=key, ca=str(ca))

    async def ask() -> None:
        while True:
            try:
                await client.complete("more", max_tokens=_ANSWER)
            except ChorusError:
                await asyncio.sleep(0)

    await asyncio.gather(*(ask() for _ in range(_FLOODERS)))


async def fairness(bench: Bench, processes: Processes, seconds: float) -> list[Bar]:
    """Alone, flooded, and alone again, since the machine's speed may change."""
    quiet = bench.with_key(await bench.key("quiet", Limits()))
    loud = await bench.key("loud", Limits(requests_per_minute=60, concurrent=4))
    await latencies(quiet, 2.0)
    alone = await latencies(quiet, seconds / 2)
    where = [f"{name}@127.0.0.1:{port}" for name, port in bench.ports.items()]
    argv = [sys.executable, __file__, "--flood", str(loud), "--ca", str(bench.ca), *where]
    flooder = processes.start("flood", argv)
    await asyncio.sleep(3.0)
    flooded = await latencies(quiet, seconds)
    flooder.check()
    processes.end(flooder)
    alone += await latencies(quiet, seconds / 2)
    ratio = percentile(flooded, 0.99) / percentile(alone, 0.99)
    print("\n| answers of another key | count | p50 ms | p99 ms |\n|---|---|---|---|")
    for what, found in (("alone", alone), ("flooded", flooded)):
        p50, p99 = (1000 * percentile(found, share) for share in (0.5, 0.99))
        print(f"| {what} | {len(found)} | {p50:.0f} | {p99:.0f} |")
    return [
        Bar(
            f"a flood by one key leaves another's p99 at {ratio:.2f} of what it was (at most {_SLOWER})",
            ratio <= _SLOWER,
        )
    ]


async def run(seconds: float, valkey: Path | None) -> int:
    """Measures and prints; returns an exit status."""
    print(f"{machine()}; quotas in {'Valkey' if valkey is not None else 'a file'}.\n")
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as folder, processes_in(Path(folder)) as processes:
        bench = Bench(processes, valkey=valkey)
        try:
            await bench.mesh.until_all_serve()
            say("over a minute of asking for more than there is ...")
            bars = await exactness(bench)
            say("a flood ...")
            bars += await fairness(bench, processes, seconds)
        finally:
            await bench.close()
    return verdict(bars)


def main() -> int:
    """Returns 0 if every bar was met, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks/quotas.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="floods for a shorter while")
    parser.add_argument("--valkey", type=Path, metavar="FILE", help="keep quotas at the server whose URL is in FILE")
    parser.add_argument("--flood", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ca", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("where", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flood is not None:
        asyncio.run(flood(options.flood, options.ca, options.where))
        return 0
    try:
        return asyncio.run(run(6.0 if options.quick else 12.0, options.valkey))
    except (BenchmarkError, ChorusError) as error:
        print(f"benchmarks/quotas.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
