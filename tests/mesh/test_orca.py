"""A runner's load as balancers read it, and as the registry hears it: over mutual TLS, with a graphics device."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import grpc
import pynvml
import pytest

from chorus.api.inference.v1 import generation_pb2
from chorus.api.runner.v1 import runner_pb2 as pb
from chorus.core.errors import EngineError
from chorus.core.fleet.records import Gpu, Load, ModelLoad
from chorus.core.identity import Role
from chorus.hardware import Inventory
from chorus.hardware.nvml import NvmlGpus
from chorus.runner.orca import LoadReporter
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.pace import ManualPace
from chorus.wire.errors import from_rpc_error
from chorus.wire.orca import METHOD, TRAILER, OrcaLoadReport, OrcaLoadReportRequest, encode_report
from tests.hardware.fake_nvml import FakeDevice, FakeNvml
from tests.mesh.local_mesh import LocalMesh

GB = 1 << 30


def machine() -> Inventory:
    """One whose GPU is hot and held back."""
    hot = FakeDevice(temperature=88, reasons=pynvml.nvmlClocksEventReasonHwThermalSlowdown)
    return Inventory("test-node", gpus=NvmlGpus(FakeNvml(hot)))


async def reports(local_mesh: LocalMesh, runner: Any, role: Role = Role.CLIENT, interval_s: float = 0.0) -> Any:
    channel = await local_mesh.channel(runner.address, Role.RUNNER, runner.presence.runner_id, role, "somebody")
    method = channel.unary_stream(
        METHOD,
        request_serializer=OrcaLoadReportRequest.SerializeToString,
        response_deserializer=OrcaLoadReport.FromString,
    )
    request = OrcaLoadReportRequest()
    request.report_interval.FromMilliseconds(round(interval_s * 1000))
    return method(request)


def ask(prompt: str, model: str = "") -> pb.GenerateRequest:
    return pb.GenerateRequest(spec=generation_pb2.GenerationSpec(model=model, prompt=prompt))


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_everything_that_is_known_is_in_a_report() -> None:
    load = Load(
        models=(
            ModelLoad("a", 3, 4, 2, 100, 400, 20.0, kv_cached_tokens=50, prompt_tokens_per_second=900.0, preemptions=1),
            ModelLoad("b", 0, 4, 0, 0, 400),
        ),
        memory_available_bytes=4 * GB,
        cpu_utilization=0.75,
        gpus=(Gpu(1, "GPU-1", "card", 10 * GB, 4 * GB, "", 0.9, 88.0, True), Gpu(2, "GPU-2", "silent", 0, 0)),
    )
    report = encode_report(
        load, memory_total_bytes=16 * GB, requests_per_s=2.5, errors_per_s=0.5, request_cost={"prompt_tokens": 7}
    )
    assert (report.cpu_utilization, report.mem_utilization) == (0.75, 0.75)
    assert (report.application_utilization, report.rps_fractional, report.eps) == (3 / 8, 2.5, 0.5)
    assert dict(report.request_cost) == {"prompt_tokens": 7}
    assert dict(report.utilization) == {
        "slots": 3 / 8,
        "kv": 1 / 8,
        "gpu.1.memory": pytest.approx(0.6),
        "gpu.1.utilization": 0.9,
    }
    assert dict(report.named_metrics) == {
        "models_loaded": 2,
        "slots_used": 3,
        "slots_free": 5,
        "queued": 2,
        "kv_used": 100,
        "kv_total": 800,
        "kv_cached": 50,
        "tokens_per_second": 20,
        "prompt_tokens_per_second": 900,
        "preemptions": 1,
        "memory_available_bytes": 4 * GB,
        "gpu.1.memory_free_bytes": 4 * GB,
        "gpu.1.utilization": 0.9,
        "gpu.1.temperature_celsius": 88,
        "gpu.1.throttled": 1,
    }


def test_the_bytes_are_those_of_the_format() -> None:
    """By the field numbers of xds/data/orca/v3/orca_load_report.proto, written down here by hand."""
    report = OrcaLoadReport(cpu_utilization=1.0, rps=3, rps_fractional=1.0, application_utilization=1.0)
    report.named_metrics["q"] = 1.0
    one = b"\x00\x00\x00\x00\x00\x00\xf0\x3f"
    entry = b"\x0a\x01q\x11" + one
    assert report.SerializeToString(deterministic=True) == (
        b"\x09" + one + b"\x18\x03" + b"\x31" + one + b"\x42" + bytes([len(entry)]) + entry + b"\x49" + one
    )


# --- over the wire ----------------------------------------------------------------------------------------------------


@dataclass
class Trailers:
    """The part of a call's context that takes trailing metadata."""

    sent: dict[str, bytes] = field(default_factory=dict)

    def set_trailing_metadata(self, metadata: tuple[tuple[str, bytes], ...]) -> None:
        self.sent |= dict(metadata)


async def test_an_answer_comes_with_the_load_and_its_own_cost(local_mesh: LocalMesh) -> None:
    """Without the wire: gRPC's C core takes this trailer away from Python's clients. tests/interop reads it off."""
    runner = await local_mesh.runner(inventory=machine())
    reporter = LoadReporter(runner.presence)
    context = Trailers()
    with reporter.request(context) as cost:
        cost["prompt_tokens"] = 7
    report = OrcaLoadReport.FromString(context.sent[TRAILER])
    assert dict(report.request_cost) == {"prompt_tokens": 7}
    assert report.named_metrics["slots_free"] > 0
    assert report.named_metrics["gpu.0.temperature_celsius"] == 88
    assert report.named_metrics["gpu.0.throttled"] == 1
    assert report.rps_fractional > 0


@pytest.mark.parametrize("error", [EngineError("out of luck"), asyncio.CancelledError(), GeneratorExit()])
async def test_who_gets_no_answer_gets_no_report(local_mesh: LocalMesh, error: BaseException) -> None:
    context = Trailers()
    reporter = LoadReporter((await local_mesh.runner()).presence)
    with pytest.raises(type(error)), reporter.request(context):
        raise error
    assert context.sent == {}


async def test_the_stream_tells_at_once_and_again(local_mesh: LocalMesh) -> None:
    pace = ManualPace()
    engine = FakeEngine(slots=2, pace=pace)
    runner = await local_mesh.runner(engine=engine)
    call = await reports(local_mesh, runner, interval_s=0.1)
    first = await anext(aiter(call))
    assert (first.named_metrics["slots_free"], first.application_utilization) == (2, 0.0)
    stub = await local_mesh.runner_stub(runner)
    generation = stub.Generate(ask("echo:hello"))
    try:
        async for report in call:
            if report.application_utilization == 0.5:
                assert report.named_metrics["slots_free"] == 1
                break
    finally:
        generation.cancel()
        call.cancel()


async def test_failures_are_counted_where_they_are_the_runners_own(local_mesh: LocalMesh) -> None:
    engine = FakeEngine()
    runner = await local_mesh.runner(engine=engine)
    stub = await local_mesh.runner_stub(runner)
    engine.fail_next(error=EngineError("out of luck"))
    for model in ("", "gpt-9"):
        with pytest.raises(grpc.RpcError):
            async for _ in stub.Generate(
                pb.GenerateRequest(spec=generation_pb2.GenerationSpec(model=model, prompt="x"))
            ):
                pass
    call = await reports(local_mesh, runner)
    report = await anext(aiter(call))
    call.cancel()
    assert 0 < report.eps < report.rps_fractional


@pytest.mark.parametrize("role", list(Role))
async def test_who_may_know(local_mesh: LocalMesh, role: Role) -> None:
    call = await reports(local_mesh, await local_mesh.runner(), role)
    try:
        if role in (Role.COORDINATOR, Role.CLIENT, Role.ADMIN):
            assert (await anext(aiter(call))).named_metrics["slots_free"] > 0
        else:
            with pytest.raises(grpc.RpcError) as refused:
                await anext(aiter(call))
            assert from_rpc_error(refused.value).reason == "PERMISSION_DENIED"
    finally:
        call.cancel()


async def test_a_heartbeat_tells_of_the_graphics_device(local_mesh: LocalMesh) -> None:
    registry = await local_mesh.registry()
    await local_mesh.runner(f"registry@{registry.address}", inventory=machine())
    record = await local_mesh.record(registry, "r1", lambda record: record.sequence > 2 and bool(record.load.gpus))
    (gpu,) = record.load.gpus
    assert (gpu.utilization, gpu.temperature_celsius, gpu.throttled) == (0.37, 88.0, True)
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes) == (12 * GB, 11 * GB)
    assert record.load.memory_available_bytes > 0
    assert 0 <= record.load.cpu_utilization <= 1
    assert record.load.models[0].slots_total == FakeEngine().load_report()[0].slots_total
