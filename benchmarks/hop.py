"""What the hop through a coordinator costs, beside a bare grpc.aio byte relay and Envoy in the same run; and none.

Processes on loopback, all over mutual TLS 1.3: a registry, a runner with the fake engine, a coordinator, a relay that
only passes bytes on, the same on uvloop, and Envoy with one worker. The same calls go directly to the runner (as an
admin, who needs no ticket), in direct mode (a client with a ticket, which it gets from the coordinator first), and
through each of the four, in interleaved rounds. The engine stamps each token with CLOCK_MONOTONIC, which all processes
of a machine share, so the latency of every single message is known.

  unary      CountTokens, one after another: the round trip
  first      Generate: from the call to the first token; the engine's own 20 ms are in it on every path, and the
             request for a ticket in direct mode
  message    each token of 8 streams at 50 tokens a second: from the engine to the client
  capacity   16 streams as fast as they go: messages for each second of CPU that the process in the middle used

Exits with 1 where a bar is missed (medians): what the coordinator adds to a message is at most 1.3 times what the bare
relay on asyncio's own loop adds, to a first token at most 5 ms, since it checks, admits and places the request first,
which a relay does not; and direct mode adds nothing to a message.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import envoy_hop
import grpc.aio
from figures import Bar, percentile, verdict
from meshes import Mesh, Shape
from processes import BenchmarkError, Processes, Started, free_port, machine, processes_in, say
from prometheus_client import CollectorRegistry

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.api.inference.v1 import generation_pb2
from chorus.api.runner.v1 import runner_pb2
from chorus.config import load_config
from chorus.core.generation import Event, GenerationRequest, Priority, TokenDelta
from chorus.core.identity import Role, SpiffeId
from chorus.hardware import Inventory
from chorus.runner.service import RunnerService
from chorus.testing.engine_fake import FakeEngine, FakeModel
from chorus.transport import open_channel
from chorus.transport.process import load_identity, run_service

_HERE = Path(__file__).resolve().parent
PACED_STREAMS, PACED_RATE, PACED_TOKENS = 8, 50.0, 100
FREE_STREAMS, FREE_TOKENS = 16, 400
UNARY_CALLS = 150
SHARES = (0.50, 0.99)
PATHS = ("direct", "ticket", "relay", "uvloop", "envoy", "coordinator")
HOP_BAR = 1.3
FIRST_BAR_MS = 5.0
# What two measurements of the same path differ by, in milliseconds.
NOTHING_MS = 0.05
RELAYS = ("relay", "uvloop")
COORDINATOR, RUNNER = "/chorus.api.coordinator.v1.Coordinator/", "/chorus.api.runner.v1.ModelRunner/"


class StampedEngine(FakeEngine):
    """The fake engine, each token's text being the time at which it was made. Batch requests come unpaced."""

    def __init__(self) -> None:
        model = FakeModel(answer_tokens=10**6, context_length=10**6)
        super().__init__([model], slots=64, tokens_per_second=PACED_RATE)
        self._free = FakeEngine([model], slots=64)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Generates, as `Engine.generate` says."""
        events = self._free.generate(request) if request.priority is Priority.BATCH else super().generate(request)
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, TokenDelta):
                    event = replace(event, text=str(time.monotonic_ns()))
                yield event


def serve_runner() -> int:
    """The runner's process; its configuration is in the environment."""
    config = load_config(environ=os.environ)

    def build(metrics: CollectorRegistry) -> RunnerService:
        return RunnerService(
            config,
            identity=load_identity(config.mesh, Role.RUNNER, "bench"),
            engine=StampedEngine(),
            inventory=Inventory("bench-node"),
            name="bench",
            metrics=metrics,
        )

    return run_service("runner", build, log=config.log, metrics=CollectorRegistry())


# --- the mesh -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ways:
    """A channel for each path, and the process in the middle of it."""

    channels: dict[str, grpc.aio.Channel]
    middles: dict[str, Started]

    @property
    def paths(self) -> list[str]:
        """Those that there are: Envoy may not be installed."""
        return [path for path in PATHS if path in self.channels]


@contextlib.asynccontextmanager
async def ways_through(processes: Processes) -> AsyncIterator[Ways]:
    """A mesh with a relay and Envoy beside its coordinator, up once a generation went through each path."""
    runner = free_port()
    shape = Shape(
        runners=("bench",),
        runner=f"import sys; sys.path.insert(0, {str(_HERE)!r}); import hop; sys.exit(hop.serve_runner())",
        # Nobody leaves because the machine is busy with the benchmark.
        environ={"CHORUS_REGISTRY__LEASE_TTL_S": "30", "CHORUS_LOG__FORMAT": "json"},
        own={"bench": {"CHORUS_RUNNER__LISTEN": f"127.0.0.1:{runner}"}},
    )
    mesh = Mesh(processes, shape)
    middles = {"coordinator": mesh.started["coordinator"]}
    coordinator = mesh.port("coordinator")
    admin, client = mesh.certify(Role.ADMIN, "caller"), mesh.certify(Role.CLIENT, "caller")
    trust_domain = client.spiffe_id.trust_domain
    upstream = SpiffeId(trust_domain, Role.RUNNER, "bench")

    def server(name: str) -> SpiffeId:
        return SpiffeId(trust_domain, Role.COORDINATOR, name)

    ways = [
        ("direct", runner, upstream, admin),
        ("ticket", runner, upstream, client),
        ("grantor", coordinator, server("coordinator"), client),
        ("coordinator", coordinator, server("coordinator"), client),
    ]
    for name in RELAYS:
        relay_port = await start_relay(processes, mesh, middles, runner, upstream, name)
        ways.append((name, relay_port, server(name), client))
    envoy_port = start_envoy(processes, mesh, middles, runner, upstream)
    if envoy_port is not None:
        ways.append(("envoy", envoy_port, server("envoy"), client))
    async with contextlib.AsyncExitStack() as stack:
        channels = {}
        for path, port, who, identity in ways:
            channel = open_channel(f"127.0.0.1:{port}", identity=identity, server=who)
            channels[path] = await stack.enter_async_context(channel)
        found = Ways(channels, middles)
        await until_ready(found, processes)
        yield found


async def start_relay(
    processes: Processes, mesh: Mesh, middles: dict[str, Started], port: int, upstream: SpiffeId, name: str
) -> int:
    """Starts a bare relay, on the event loop that its name says; returns its port."""
    mesh.certify(Role.COORDINATOR, name)
    argv = [sys.executable, _HERE / "relay.py", f"127.0.0.1:{port}", str(upstream), mesh.folder / f"coordinator-{name}"]
    relay = middles[name] = processes.start(name, [*argv, name])
    line = await asyncio.to_thread(relay.stdout.readline)
    relay.check()
    return int(line)


def start_envoy(
    processes: Processes, mesh: Mesh, middles: dict[str, Started], upstream_port: int, upstream: SpiffeId
) -> int | None:
    """Starts Envoy, where it is installed; returns its port."""
    program = envoy_hop.executable()
    if program is None:
        return None
    mesh.certify(Role.COORDINATOR, "envoy")
    port, configuration = free_port(), mesh.folder / "envoy.json"
    envoy_hop.write_configuration(
        configuration,
        port=port,
        own=mesh.folder / "coordinator-envoy",
        upstream_port=upstream_port,
        upstream_name=upstream.dns_name,
        prefixes=(COORDINATOR, RUNNER),
    )
    words = ("--config-path", configuration, "--concurrency", "1", "--use-dynamic-base-id", "-l", "warn")
    middles["envoy"] = processes.start("envoy", [program, *words])
    return port


async def until_ready(ways: Ways, processes: Processes) -> None:
    """Returns once a generation went through each path. Raises `BenchmarkError` if none does in 30 seconds."""
    deadline = time.monotonic() + 30
    for path in ways.paths:
        while True:
            try:
                async for _ in generate(ways, path, tokens=1, paced=False):
                    pass
                break
            except grpc.aio.AioRpcError as error:
                processes.check()
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"{path} did not come up: {error.details()}") from None
                await asyncio.sleep(0.1)


# --- calls ----------------------------------------------------------------------------------------------------------


def prefix(path: str) -> str:
    """The relays speak as a coordinator, like whom they are measured against."""
    return RUNNER if path in ("direct", "ticket") else COORDINATOR


async def generate(ways: Ways, path: str, *, tokens: int, paced: bool) -> AsyncIterator[generation_pb2.GenerationEvent]:
    """The events of a generation."""
    request: coordinator_pb2.GenerateRequest | runner_pb2.GenerateRequest = coordinator_pb2.GenerateRequest()
    request.spec.prompt = "how much does a hop cost?"
    request.spec.stop.max_tokens = tokens
    request.spec.priority = generation_pb2.PRIORITY_INTERACTIVE if paced else generation_pb2.PRIORITY_BATCH
    if path == "ticket":
        place = ways.channels["grantor"].unary_unary(
            f"{COORDINATOR}Place",
            request_serializer=coordinator_pb2.PlaceRequest.SerializeToString,
            response_deserializer=coordinator_pb2.PlaceResponse.FromString,
        )
        placed = await place(coordinator_pb2.PlaceRequest(spec=request.spec), timeout=10)
        request = runner_pb2.GenerateRequest(spec=request.spec, ticket=placed.ticket)
    call = ways.channels[path].unary_stream(
        f"{prefix(path)}Generate",
        request_serializer=type(request).SerializeToString,
        response_deserializer=coordinator_pb2.GenerateResponse.FromString,
    )(request, timeout=60)
    try:
        async for response in call:
            yield response.event
    finally:
        call.cancel()


async def unary_latencies(ways: Ways, path: str) -> list[float]:
    """Milliseconds of each of many CountTokens calls, one after another."""
    request = coordinator_pb2.CountTokensRequest()
    request.spec.prompt = "how much does a hop cost?"
    call = ways.channels[path].unary_unary(
        f"{prefix(path)}CountTokens",
        request_serializer=coordinator_pb2.CountTokensRequest.SerializeToString,
        response_deserializer=coordinator_pb2.CountTokensResponse.FromString,
    )
    found = []
    for _ in range(UNARY_CALLS):
        began = time.monotonic_ns()
        await call(request, timeout=10)
        found.append((time.monotonic_ns() - began) / 1e6)
    return found


async def message_latencies(ways: Ways, path: str) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token of each stream, and of each token from the engine to here."""
    first: list[float] = []
    later: list[float] = []

    async def one(delay_s: float) -> None:
        await asyncio.sleep(delay_s)  # apart, as callers are
        began, seen = time.monotonic_ns(), False
        async for event in generate(ways, path, tokens=PACED_TOKENS, paced=True):
            now = time.monotonic_ns()
            if event.WhichOneof("event") == "delta":
                if not seen:
                    seen = True
                    first.append((now - began) / 1e6)
                later.append((now - int(event.delta.text)) / 1e6)

    await asyncio.gather(*(one(number / PACED_RATE / PACED_STREAMS) for number in range(PACED_STREAMS)))
    return first, later


async def capacity(ways: Ways, path: str) -> tuple[float, float]:
    """Messages a second, and messages for each CPU second of the process in the middle (0 on the direct path)."""
    process = ways.middles.get(path)
    count = 0

    async def one() -> None:
        nonlocal count
        async for _ in generate(ways, path, tokens=FREE_TOKENS, paced=False):
            count += 1

    before = process.cpu_s() if process else 0.0
    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(FREE_STREAMS)))
    elapsed = time.monotonic() - began
    used = process.cpu_s() - before if process else 0.0
    return count / elapsed, count / used if used else 0.0


# --- figures --------------------------------------------------------------------------------------------------------


Found = dict[tuple[str, str], list[list[float]]]
Rates = dict[tuple[str, str], list[float]]


async def measure(processes: Processes, rounds: int) -> int:
    """Runs the rounds and prints the tables; returns the exit code."""
    found: Found = defaultdict(list)
    rates: Rates = defaultdict(list)
    async with ways_through(processes) as ways:
        paths = ways.paths
        for number in range(rounds + 1):
            for path in random.sample(paths, len(paths)):
                unary = [] if path == "ticket" else await unary_latencies(ways, path)
                first, later = await message_latencies(ways, path)
                total, per_cpu = await capacity(ways, path)
                if number == 0:
                    continue  # a warm-up
                found["unary", path].append(unary)
                found["first", path].append(first)
                found["message", path].append(later)
                rates["messages/s", path].append(total)
                rates["messages/CPU s", path].append(per_cpu)
            say(f"round {number} of {rounds}" if number else "warmed up")
    print_tables(found, rates, paths, rounds)
    return judge(found)


def added(found: Found, kind: str, path: str, share: float) -> list[float]:
    """What a path adds to the direct one in each round, in milliseconds; empty where it wasn't measured."""
    pairs = zip(found[kind, path], found[kind, "direct"], strict=True)
    return [percentile(values, share) - percentile(base, share) for values, base in pairs if values]


def print_tables(found: Found, rates: Rates, paths: list[str], rounds: int) -> None:
    """Latencies with what each path adds to the direct one, then rates; medians over the rounds."""
    print(f"{rounds} interleaved rounds; {machine()}, grpcio {grpc.__version__}; loopback, mutual TLS 1.3\n")
    others = paths[1:]
    print("| latency (ms) | direct p50 | p99 |" + "".join(f" {path} adds p50 | p99 |" for path in others))
    print("|---|---|---|" + "---|---|" * len(others))
    for kind in ("unary", "first", "message"):
        cells = [statistics.median(percentile(values, share) for values in found[kind, "direct"]) for share in SHARES]
        shown = [f"{cell:.2f}" for cell in cells]
        for path in others:
            for share in SHARES:
                values = added(found, kind, path, share)
                shown.append(f"{statistics.median(values):.2f}" if values else "-")
        print(f"| {kind} | " + " | ".join(shown) + " |")
    print("\n| 16 streams at full speed |" + "".join(f" {path} |" for path in paths) + " coordinator / relay |")
    print("|---|" + "---|" * (len(paths) + 1))
    for kind in ("messages/s", "messages/CPU s"):
        middles = [statistics.median(rates[kind, path]) for path in paths]
        pairs = zip(rates[kind, "coordinator"], rates[kind, "relay"], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        print(f"| {kind} | " + " | ".join(f"{rate:,.0f}" if rate else "-" for rate in middles) + f" | {ratio:.2f} |")


def judge(found: Found) -> int:
    """Says whether the bars are met; returns the exit code."""

    def beside(kind: str) -> tuple[str, float, float]:
        paths = ("coordinator", *RELAYS)
        ours, theirs, fast = (statistics.median(added(found, kind, path, 0.5)) for path in paths)
        text = f"the coordinator adds {ours:.2f} ms to a {kind}, a bare relay {theirs:.2f} ms ({fast:.2f} on uvloop)"
        return text, ours, theirs

    message, ours, theirs = beside("message")
    bars = [Bar(f"{message}: {ours / theirs:.2f} times (bar: {HOP_BAR})", ours <= HOP_BAR * theirs)]
    first, ours, _ = beside("first")
    bars.append(Bar(f"{first} (bar: {FIRST_BAR_MS} ms)", ours <= FIRST_BAR_MS))
    more = statistics.median(added(found, "message", "ticket", 0.5))
    nothing = f"direct mode adds {more:.2f} ms to a message (bar: nothing, to {NOTHING_MS} ms)"
    status = verdict([*bars, Bar(nothing, more <= NOTHING_MS)])
    if ("message", "envoy") not in found:
        print(f"not measured: Envoy, which isn't installed here ({envoy_hop.INSTALL})")
    return status


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds after the warm-up (default: 10, some 4 minutes)")
    parser.add_argument("--quick", action="store_true", help="one round: does it run at all?")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chorus-hop-") as folder, processes_in(Path(folder)) as processes:
        try:
            return asyncio.run(measure(processes, 1 if arguments.quick else arguments.rounds))
        except BenchmarkError as error:
            say(str(error))
            return 2


if __name__ == "__main__":
    sys.exit(main())
