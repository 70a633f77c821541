"""What the hop through a coordinator costs, beside a bare grpc.aio byte relay in the same run.

Four processes on loopback, all over mutual TLS: a registry, a runner with the fake engine, a coordinator, and a relay
that only passes bytes on. The same calls go directly to the runner, through the relay and through the coordinator, in
interleaved rounds. The engine stamps each token with CLOCK_MONOTONIC, which all processes of a machine share, so the
latency of every single message is known.

  unary      CountTokens, one after another: the round trip
  first      Generate: from the call to the first token; the engine's own 20 ms are in it on every path
  message    each token of 8 streams at 50 tokens a second: from the engine to the client
  capacity   16 streams as fast as they go: messages for each second of CPU that the process in the middle used
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grpc.aio
import psutil
from prometheus_client import CollectorRegistry

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.api.inference.v1 import generation_pb2
from chorus.config import load_config
from chorus.core.generation import Event, GenerationRequest, Priority, TokenDelta
from chorus.core.identity import Role
from chorus.hardware import Inventory
from chorus.runner.service import RunnerService
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine, FakeModel
from chorus.transport import TlsIdentity, open_channel
from chorus.transport.process import load_identity, run_service

PACED_STREAMS, PACED_RATE, PACED_TOKENS = 8, 50.0, 100
FREE_STREAMS, FREE_TOKENS = 16, 400
UNARY_CALLS = 150
PATHS = ("direct", "relay", "coordinator")
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
class Mesh:
    """Where everybody is, and the process in the middle of each path."""

    channels: dict[str, grpc.aio.Channel]
    processes: dict[str, psutil.Process]


def free_ports(count: int) -> list[int]:
    """Ports that nobody has just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


@contextlib.contextmanager
def processes_in(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes whose errors go to a file in `folder`; ends those that it started."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *command: str, environ: dict[str, str]) -> subprocess.Popen[str]:
        with (folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **environ},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.asynccontextmanager
async def running_mesh(folder: Path) -> AsyncIterator[Mesh]:
    """The four processes, up once a generation went through each path."""
    certificates = MeshCertificates()
    members = (Role.REGISTRY, "registry"), (Role.RUNNER, "bench"), (Role.COORDINATOR, "coordinator")
    for role, name in (*members, (Role.COORDINATOR, "relay"), (Role.ADMIN, "bench")):
        certificates.leaf(role, name).write(folder)
    registry, runner, coordinator = free_ports(3)
    environ = {
        "CHORUS_MESH__TRUST_DOMAIN": certificates.authority.trust_domain,
        "CHORUS_MESH__CERTS_DIR": str(folder),
        "CHORUS_LOG__FORMAT": "json",
        "CHORUS_REGISTRY__LISTEN": f"127.0.0.1:{registry}",
        "CHORUS_RUNNER__LISTEN": f"127.0.0.1:{runner}",
        "CHORUS_RUNNER__REGISTRIES": f"127.0.0.1:{registry}",
        "CHORUS_COORDINATOR__LISTEN": f"127.0.0.1:{coordinator}",
        "CHORUS_COORDINATOR__REGISTRIES": f"127.0.0.1:{registry}",
    }
    runner_id = certificates.id(Role.RUNNER, "bench")
    with processes_in(folder) as start:
        start("registry", "-m", "chorus.cli.main", "registry", environ=environ)
        start("runner", __file__, "--serve-runner", environ=environ)
        middle = start("coordinator", "-m", "chorus.cli.main", "coordinator", environ=environ)
        relay_file = str(Path(__file__).with_name("relay.py"))
        upstream = f"127.0.0.1:{runner}", str(runner_id), str(folder / "coordinator-relay")
        relay = start("relay", relay_file, *upstream, environ=environ)
        assert relay.stdout is not None
        relay_port = int(await asyncio.to_thread(relay.stdout.readline))
        identity = TlsIdentity.load(folder / "admin-bench")  # whom runners answer without a ticket
        async with contextlib.AsyncExitStack() as stack:
            channels = {}
            for path, port, role, name in (
                ("direct", runner, Role.RUNNER, "bench"),
                ("relay", relay_port, Role.COORDINATOR, "relay"),
                ("coordinator", coordinator, Role.COORDINATOR, "coordinator"),
            ):
                channel = open_channel(f"127.0.0.1:{port}", identity=identity, server=certificates.id(role, name))
                channels[path] = await stack.enter_async_context(channel)
            mesh = Mesh(channels, {"relay": psutil.Process(relay.pid), "coordinator": psutil.Process(middle.pid)})
            await until_ready(mesh, folder)
            yield mesh


async def until_ready(mesh: Mesh, folder: Path) -> None:
    """Returns once a generation went through each path; says what the processes said if none does in 30 seconds."""
    deadline = time.monotonic() + 30
    for path in PATHS:
        while True:
            try:
                async for _ in generate(mesh, path, tokens=1, paced=False):
                    pass
                break
            except grpc.aio.AioRpcError as error:
                if time.monotonic() > deadline:
                    raise SystemExit(f"{path} did not come up: {error.details()}\n{logs_in(folder)}") from None
                await asyncio.sleep(0.1)


def logs_in(folder: Path) -> str:
    """What the processes said."""
    return "\n".join(log.read_text() for log in sorted(folder.glob("*.log")))


# --- calls ----------------------------------------------------------------------------------------------------------


def prefix(path: str) -> str:
    """The relay speaks as a coordinator, like whom it is measured against."""
    return RUNNER if path == "direct" else COORDINATOR


async def generate(mesh: Mesh, path: str, *, tokens: int, paced: bool) -> AsyncIterator[generation_pb2.GenerationEvent]:
    """The events of a generation."""
    request = coordinator_pb2.GenerateRequest()
    request.spec.prompt = "how much does a hop cost?"
    request.spec.stop.max_tokens = tokens
    request.spec.priority = generation_pb2.PRIORITY_INTERACTIVE if paced else generation_pb2.PRIORITY_BATCH
    call = mesh.channels[path].unary_stream(
        f"{prefix(path)}Generate",
        request_serializer=coordinator_pb2.GenerateRequest.SerializeToString,
        response_deserializer=coordinator_pb2.GenerateResponse.FromString,
    )(request, timeout=60)
    try:
        async for response in call:
            yield response.event
    finally:
        call.cancel()


async def unary_latencies(mesh: Mesh, path: str) -> list[float]:
    """Milliseconds of each of many CountTokens calls, one after another."""
    request = coordinator_pb2.CountTokensRequest()
    request.spec.prompt = "how much does a hop cost?"
    call = mesh.channels[path].unary_unary(
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


async def message_latencies(mesh: Mesh, path: str) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token of each stream, and of each token from the engine to here."""
    first: list[float] = []
    later: list[float] = []

    async def one(delay_s: float) -> None:
        await asyncio.sleep(delay_s)  # apart, as callers are
        began, seen = time.monotonic_ns(), False
        async for event in generate(mesh, path, tokens=PACED_TOKENS, paced=True):
            now = time.monotonic_ns()
            if event.WhichOneof("event") == "delta":
                if not seen:
                    seen = True
                    first.append((now - began) / 1e6)
                later.append((now - int(event.delta.text)) / 1e6)

    await asyncio.gather(*(one(number / PACED_RATE / PACED_STREAMS) for number in range(PACED_STREAMS)))
    return first, later


async def capacity(mesh: Mesh, path: str) -> tuple[float, float]:
    """Messages a second, and messages for each CPU second of the process in the middle (0 on the direct path)."""
    process = mesh.processes.get(path)
    count = 0

    async def one() -> None:
        nonlocal count
        async for _ in generate(mesh, path, tokens=FREE_TOKENS, paced=False):
            count += 1

    before = sum(process.cpu_times()[:2]) if process else 0.0
    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(FREE_STREAMS)))
    elapsed = time.monotonic() - began
    used = sum(process.cpu_times()[:2]) - before if process else 0.0
    return count / elapsed, count / used if used else 0.0


# --- figures --------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def measure(rounds: int) -> None:
    """Runs the rounds and prints the table."""
    found: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="chorus-hop-") as folder:
        async with running_mesh(Path(folder)) as mesh:
            for number in range(rounds + 1):
                for path in random.sample(PATHS, len(PATHS)):
                    unary = await unary_latencies(mesh, path)
                    first, later = await message_latencies(mesh, path)
                    total, per_cpu = await capacity(mesh, path)
                    if number == 0:
                        continue  # a warm-up
                    found["unary", path].append(unary)
                    found["first", path].append(first)
                    found["message", path].append(later)
                    rates["messages/s", path].append(total)
                    rates["messages/CPU s", path].append(per_cpu)
                if number:
                    print(f"\rround {number}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print_table(found, rates, rounds)


def print_table(
    found: dict[tuple[str, str], list[list[float]]], rates: dict[tuple[str, str], list[float]], rounds: int
) -> None:
    """Latencies with what each path adds to the direct one, then rates; medians over the rounds."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "unknown",
    )
    versions = f"grpcio {grpc.__version__}, Python {sys.version.split()[0]}"
    print(f"{rounds} interleaved rounds on {os.cpu_count()} cores of {cpu}; {versions}; loopback, mutual TLS 1.3\n")
    print("| latency (ms) | direct p50 | p99 | relay adds p50 | p99 | coordinator adds p50 | p99 | ratio p50 | p99 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in ("unary", "first", "message"):
        cells = []
        for share in (0.50, 0.99):
            direct = [percentile(values, share) for values in found[kind, "direct"]]
            added = {
                path: [percentile(values, share) - base for values, base in zip(found[kind, path], direct, strict=True)]
                for path in ("relay", "coordinator")
            }
            relay, coordinator = (statistics.median(added[path]) for path in ("relay", "coordinator"))
            cells.append((statistics.median(direct), relay, coordinator, coordinator / relay))
        rows = [[f"{cell[column]:.2f}" for cell in cells] for column in range(4)]
        print(f"| {kind} | " + " | ".join(value for row in rows for value in row) + " |")
    print("\n| 16 streams at full speed | direct | relay | coordinator | coordinator / relay |")
    print("|---|---|---|---|---|")
    for kind in ("messages/s", "messages/CPU s"):
        direct, relay, coordinator = (statistics.median(rates[kind, path]) for path in PATHS)
        pairs = zip(rates[kind, "coordinator"], rates[kind, "relay"], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        shown = f"{direct:,.0f}" if direct else "-"
        print(f"| {kind} | {shown} | {relay:,.0f} | {coordinator:,.0f} | {ratio:.2f} |")


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds after the warm-up (default: 10, some 3 minutes)")
    parser.add_argument("--quick", action="store_true", help="one round: does it run at all?")
    parser.add_argument("--serve-runner", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_runner:
        return serve_runner()
    asyncio.run(measure(1 if arguments.quick else arguments.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
