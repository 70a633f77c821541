"""A registry with a thousand runners, each with its own TLS connection and identity: under half a core.

    .venv/bin/python benchmarks/heartbeats.py
    .venv/bin/python benchmarks/heartbeats.py --calls    as runners of older versions do it, a call for each heartbeat

One registry, as `chorus registry` runs it. Runners are connections of a few load processes: each shows a certificate of
its own, registers, and sends one heartbeat a second, by the runner's own code, with what one with two models and a GPU
reports. Two watchers with the certificates of coordinators read the directory as coordinators do, load changes
included. What counts is the processor time that the registry's process used, over its wall-clock seconds; the others
run on the loop that services run on, so that they take no more of the machine than they must. The time of each
heartbeat from its sending to its answer, and to each watcher, is told beside it. All are on one machine, so the clock
is one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
from figures import Bar, percentile, verdict
from processes import BenchmarkError, Processes, Started, free_port, machine, processes_in, say
from servers import mesh_environ

_BAR = 0.5
_RUNNERS = 1000
_LOADERS = 4
_WATCHERS = 2
_INTERVAL_S = 1.0
_TTL_S = 600.0  # runners register one after the other before they send heartbeats, and none may lapse meanwhile
_CONNECTING = 20  # at the same time, of each load process
_DEADLINE_S = 10.0
_READY_S = 180.0
_REGISTRY = """
import cProfile, os, sys
from chorus.config import load_config
from chorus.registry.main import run
target = os.environ.get("CHORUS_BENCH_PROFILE")
profile = cProfile.Profile() if target else None
code = profile.runcall(run, load_config()) if profile else run(load_config())
if profile:
    profile.dump_stats(target)
sys.exit(code)
"""


# --- what the load processes do -------------------------------------------------------------------------------------


def _record(name: str) -> Any:
    """A runner with two models, one of them loaded, and a GPU."""
    from chorus.core.fleet.records import (
        Artifact,
        Cpu,
        EngineInfo,
        EngineKind,
        Feature,
        Gpu,
        Load,
        ModelLoad,
        ModelState,
        ModelStatus,
        Node,
        Runner,
        RunnerRecord,
        RunnerState,
        Tier,
    )  # fmt: skip

    models = tuple(
        ModelStatus(
            Artifact(family, f"{family}.gguf", "ab" * 32, 1 << 30, "Q8_0", 10**9, 8192, "llama", Tier.SMALL, ("chat",)),
            "llama.cpp", state, frozenset(Feature), 8192, 4,
        )
        for family, state in (("alpha", ModelState.LOADED), ("beta", ModelState.AVAILABLE))
    )  # fmt: skip
    gpu = Gpu(0, f"GPU-{name}", "GPU", 24 << 30, 8 << 30, "1", 0.5, 60.0, False)
    node = Node(f"node-{name}", name, "linux", Cpu("cpu", 8, 16), 64 << 30, 32 << 30, (gpu,))
    engine = EngineInfo("llama.cpp", "1", EngineKind.LOCAL, ("cuda",))
    server = f"{name}.runner.test.chorus.local"
    runner = Runner(name, 1, node.node_id, "127.0.0.1:7201", server, "1", (engine,), models)
    loads = (ModelLoad("alpha.gguf", 1, 4, 0, 1000, 32_768, 40.0, 4000, 1500.0),)
    return RunnerRecord(runner, node, RunnerState.READY, Load(loads, 32 << 30, 0.3, (gpu,)), 1)


class _Runner:
    """One runner's connection. Times are of the machine's monotonic clock."""

    def __init__(self, name: str, address: str, folder: Path, *, calls: bool) -> None:
        from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
        from chorus.runner.heartbeats import Heartbeats
        from chorus.transport import TlsIdentity, open_channel
        from chorus.wire.resources import encode_load, encode_runner_record

        identity = TlsIdentity.load(folder / f"runner-{name}")
        self._channel = open_channel(address, identity=identity, server="registry.registry.test.chorus.local")
        self._stub: Any = registry_pb2_grpc.RegistryStub(self._channel)
        self._stream = Heartbeats(self._stub, "the registry")
        self._calls = calls
        record = _record(name)
        self._register = registry_pb2.RegisterRequest(record=encode_runner_record(record))
        self._heartbeat = registry_pb2.HeartbeatRequest(
            runner_id=name, incarnation=1, state=self._register.record.state, load=encode_load(record.load)
        )
        self._sequence = 1
        self.answered_s: list[float] = []
        self.failures: list[str] = []

    async def connect(self) -> None:
        await self._stub.Register(self._register, timeout=_READY_S, wait_for_ready=True)
        await self._send()  # a stream is opened

    async def _send(self) -> None:
        self._sequence += 1
        self._heartbeat.sequence = self._sequence
        if self._calls:
            await self._stub.Heartbeat(self._heartbeat, timeout=_DEADLINE_S)
        else:
            await self._stream.send(self._heartbeat, timeout_s=_DEADLINE_S, patient=False)

    async def beat(self, until: float, rng: random.Random) -> None:
        import grpc

        from chorus.core.errors import ChorusError

        due = time.monotonic() + rng.random() * _INTERVAL_S
        while due < until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            heartbeat = self._heartbeat
            sent = time.monotonic_ns()
            # Watchers read from it when the heartbeat was sent.
            heartbeat.load.memory_available_bytes = sent
            heartbeat.load.models[0].slots_used_count = rng.randrange(5)
            try:
                await self._send()
            except (grpc.RpcError, ChorusError) as error:
                self.failures.append(str(error))
            else:
                self.answered_s.append((time.monotonic_ns() - sent) / 1e9)
            due = max(due + _INTERVAL_S, time.monotonic())

    async def close(self) -> None:
        self._stream.close()
        await self._channel.close()


async def _load(address: str, folder: Path, names: list[str], *, calls: bool) -> None:
    runners = [_Runner(name, address, folder, calls=calls) for name in names]
    door = asyncio.Semaphore(_CONNECTING)

    async def connect(runner: _Runner) -> None:
        async with door:
            await runner.connect()

    await asyncio.gather(*(connect(runner) for runner in runners))
    _tell({"connected": len(runners)})
    order = json.loads(await asyncio.to_thread(sys.stdin.readline))
    rng = random.Random(names[0])
    await asyncio.gather(*(runner.beat(order["until"], rng) for runner in runners))
    _tell(
        {
            "answered_s": [seconds for runner in runners for seconds in runner.answered_s],
            "failures": [why for runner in runners for why in runner.failures],
        }
    )
    await asyncio.gather(*(runner.close() for runner in runners))


async def _watch(address: str, folder: Path, name: str, count: int) -> None:
    """Reads the directory as a coordinator does: decoded and merged."""
    from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
    from chorus.core.fleet.directory import DirectoryMerger
    from chorus.core.fleet.events import DeltaEvent
    from chorus.transport import TlsIdentity, open_channel
    from chorus.wire.directory import DirectoryDecoder

    identity = TlsIdentity.load(folder / f"coordinator-{name}")
    channel = open_channel(address, identity=identity, server="registry.registry.test.chorus.local")
    call: Any = registry_pb2_grpc.RegistryStub(channel).WatchNodes(registry_pb2.WatchNodesRequest())
    merger, order, whole = DirectoryMerger(), None, False
    delays: list[float] = []
    orders = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    messages, decoder = aiter(call), DirectoryDecoder()
    while order is None or time.monotonic() < order["until"]:
        event = decoder.decode((await anext(messages)).event)
        now = time.monotonic_ns()
        directory = merger.apply("registry", event, time.monotonic())
        if not whole and len(directory.entries) == count:
            whole = True
            _tell({"whole": True})
        if order is None and orders.done():
            order = json.loads(orders.result())
        if order is not None and isinstance(event, DeltaEvent):
            delays += [(now - leased.record.load.memory_available_bytes) / 1e9 for leased in event.upserts]
    _tell({"delays_s": [delay for delay in delays if delay < _READY_S], "runners": len(merger.directory.entries)})
    call.cancel()
    await channel.close()


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


# --- the benchmark --------------------------------------------------------------------------------------------------


async def _answer(process: Started) -> dict[str, Any]:
    async with asyncio.timeout(_READY_S):
        line = await asyncio.to_thread(process.stdout.readline)
    if not line:
        raise BenchmarkError(f"{process.name} ended by itself. {process.last_words()}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _order(process: Started, order: dict[str, Any]) -> None:
    process.stdin.write((json.dumps(order) + "\n").encode())
    process.stdin.flush()


async def _measure(processes: Processes, options: argparse.Namespace) -> int:
    from chorus.core.identity import Role
    from chorus.testing.certificates import MeshCertificates

    say(f"certificates for {options.runners} runners")
    certificates, folder = MeshCertificates(), processes.folder
    names = [f"runner-{number:04}" for number in range(options.runners)]
    watchers = [f"coordinator-{number}" for number in range(_WATCHERS)]
    for role, of_role in ((Role.REGISTRY, ["registry"]), (Role.COORDINATOR, watchers), (Role.RUNNER, names)):
        for name in of_role:
            certificates.leaf(role, name).write(folder)
    address = f"127.0.0.1:{free_port()}"
    environ = mesh_environ(folder, certificates) | {
        "CHORUS_REGISTRY__LISTEN": address,
        "CHORUS_REGISTRY__HEARTBEAT_INTERVAL_S": str(_INTERVAL_S),
        "CHORUS_REGISTRY__LEASE_TTL_S": str(_TTL_S),
        "CHORUS_LOG__FORMAT": "json",
    }
    if options.profile:
        environ["CHORUS_BENCH_PROFILE"] = str(options.profile.absolute())
    registry = processes.start("registry", [sys.executable, "-c", _REGISTRY], environ)
    me = [sys.executable, __file__, "--address", address, "--folder", str(folder), *["--calls"] * options.calls]
    said = [
        processes.start(name, [*me, "--watch", name, "--runners", str(options.runners)], environ) for name in watchers
    ]
    say("runners connect")
    began, before = time.monotonic(), registry.cpu_s()
    loaders = [
        processes.start(f"load-{number}", [*me, "--load", *names[number::_LOADERS]], environ)
        for number in range(_LOADERS)
    ]
    await asyncio.gather(*(_answer(loader) for loader in loaders))
    await asyncio.gather(*(_answer(watcher) for watcher in said))
    connecting_s, connecting_cpu_s = time.monotonic() - began, registry.cpu_s() - before
    say(f"heartbeats for {options.seconds:.0f} s")
    until = time.monotonic() + options.seconds + 2.0
    for process in (*loaders, *said):
        _order(process, {"until": until})
    await asyncio.sleep(1.5)  # all are under way
    began, before = time.monotonic(), registry.cpu_s()
    await asyncio.sleep(until - 0.5 - time.monotonic())
    seconds, used_s = time.monotonic() - began, registry.cpu_s() - before
    memory = registry.resident_bytes()
    told = [await _answer(loader) for loader in loaders]
    seen = [await _answer(watcher) for watcher in said]
    registry.check()
    return _report(options, seconds, used_s, memory, connecting_s, connecting_cpu_s, told, seen)


def _report(
    options: argparse.Namespace,
    seconds: float,
    used_s: float,
    memory: int,
    connecting_s: float,
    connecting_cpu_s: float,
    told: list[dict[str, Any]],
    seen: list[dict[str, Any]],
) -> int:
    answered = [value for one in told for value in one["answered_s"]]
    failures = [why for one in told for why in one["failures"]]
    rate = len(answered) / (seconds + 2.0)
    share = used_s / seconds
    print(
        f"{machine()}; {options.runners} runners, each with its own TLS connection and identity, "
        f"{'a call for each heartbeat' if options.calls else 'one stream of heartbeats each'}; {_WATCHERS} watchers"
    )
    print(
        f"connecting and registering: {connecting_s:.1f} s, {1e3 * connecting_cpu_s / options.runners:.2f} ms of the "
        "registry's processor each"
    )
    print(
        f"{len(answered)} heartbeats in {seconds:.0f} s, some {rate:.0f} a second, {len(failures)} failed; the "
        f"registry used {share:.1%} of one core, {1e6 * share / rate:.0f} us a heartbeat; {memory / 2**20:.0f} MiB"
    )
    print(f"a heartbeat is answered within {_delays(answered)}")
    for number, one in enumerate(seen, start=1):
        print(f"watcher {number} knows of one within {_delays(one['delays_s'])}")
    return verdict(
        [
            Bar(f"the registry uses under {_BAR:.0%} of one core: {share:.1%}", share < _BAR),
            Bar(
                f"every heartbeat is answered, {_INTERVAL_S:g} s apart as asked: {len(failures)} failed, "
                f"{rate / options.runners:.2f} a second of each",
                not failures and rate > 0.9 * options.runners,
            ),
            Bar("both watchers see every runner", all(one["runners"] == options.runners for one in seen)),
        ]
    )


def _delays(values: list[float]) -> str:
    shares = ", ".join(f"p{share * 100:.0f} {1e3 * percentile(values, share):.1f}" for share in (0.5, 0.95, 0.99))
    return f"(ms) {shares}"


def main() -> int:
    """Prints the figures; exits with 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runners", type=int, default=_RUNNERS)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long is measured")
    parser.add_argument("--calls", action="store_true", help="a unary call for each heartbeat, not one stream")
    parser.add_argument("--quick", action="store_true", help="a first look: 8 seconds")
    parser.add_argument("--profile", type=Path, help="where to write the registry's cProfile (it is slower with it)")
    for flag in ("--address", "--watch"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        uvloop.run(_load(options.address, options.folder, options.load, calls=options.calls))
        return 0
    if options.watch:
        uvloop.run(_watch(options.address, options.folder, options.watch, options.runners))
        return 0
    if options.quick:
        options.seconds = 8.0
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="chorus-heartbeats-") as folder, processes_in(Path(folder)) as processes:
        try:
            return asyncio.run(_measure(processes, options))
        except BenchmarkError as error:
            say(str(error))
            return 2


if __name__ == "__main__":
    raise SystemExit(main())
