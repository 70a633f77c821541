"""Metrics: what is counted, under which names, and that no caller can make them grow."""

from __future__ import annotations

from enum import Enum

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from chorus.core.fleet.records import Gpu, ModelLoad, RunnerState
from chorus.telemetry.histogram import BatchHistogram, BoundedLabel
from chorus.telemetry.lease_metrics import LeaseMetrics
from chorus.telemetry.metrics import (
    GRPC_CODES,
    GenerationMetrics,
    MachineMetrics,
    RpcMetrics,
    StreamTimer,
    new_registry,
)

METHOD = "/chorus.api.runner.v1.ModelRunner/Generate"
LABEL = METHOD[1:]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry(auto_describe=True)


def samples(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
    }


def test_a_call_is_counted_from_its_start_to_its_end(registry: CollectorRegistry) -> None:
    metrics = RpcMetrics(registry, [METHOD])
    metrics.call_started(METHOD)
    assert samples(registry, "chorus_rpc_in_flight") == {(LABEL,): 1}
    metrics.call_finished(METHOD, "OK", "", 0.003)
    assert samples(registry, "chorus_rpc_in_flight") == {(LABEL,): 0}
    assert samples(registry, "chorus_rpc_requests_total") == {(LABEL, "OK"): 1}
    assert samples(registry, "chorus_rpc_errors_total") == {}
    assert registry.get_sample_value("chorus_rpc_duration_seconds_bucket", {"method": LABEL, "le": "0.0025"}) == 0
    assert registry.get_sample_value("chorus_rpc_duration_seconds_bucket", {"method": LABEL, "le": "0.005"}) == 1


def test_errors_are_counted_by_reason_and_codes_may_be_grpc_s_own(registry: CollectorRegistry) -> None:
    class Code(Enum):  # as grpc.StatusCode is
        UNAVAILABLE = (14, "unavailable")

    metrics = RpcMetrics(registry, [METHOD])
    metrics.call_started(METHOD)
    metrics.call_finished(METHOD, Code.UNAVAILABLE, "RUNNERS_UNAVAILABLE", 0.1)
    assert samples(registry, "chorus_rpc_requests_total") == {(LABEL, "UNAVAILABLE"): 1}
    assert samples(registry, "chorus_rpc_errors_total") == {(LABEL, "RUNNERS_UNAVAILABLE"): 1}


@given(st.lists(st.tuples(st.text(), st.text(), st.text()), max_size=10))
def test_what_callers_make_up_is_unknown(calls: list[tuple[str, str, str]]) -> None:
    registry = CollectorRegistry()
    metrics = RpcMetrics(registry, [METHOD])
    for method, code, reason in calls:
        metrics.call_started(method)
        metrics.call_finished(method, code, reason, 0.0)
    assert set(samples(registry, "chorus_rpc_requests_total")) <= {
        ("unknown", code) for code in (*GRPC_CODES, "unknown")
    }
    assert {method for method, _ in samples(registry, "chorus_rpc_errors_total")} <= {"unknown"}
    assert sum(samples(registry, "chorus_rpc_in_flight").values()) == 0


def test_without_known_methods_the_first_ones_are_kept(registry: CollectorRegistry) -> None:
    metrics = RpcMetrics(registry)
    for number in range(300):
        metrics.call_finished(f"/s/m{number}", "OK", "", 0.0)
    counts = samples(registry, "chorus_rpc_requests_total")
    assert len(counts) == 257
    assert counts[("unknown", "OK")] == 44


def test_a_label_is_bounded_in_number_and_length() -> None:
    label = BoundedLabel(["a"], limit=2)
    assert [label(value) for value in ("b", "c", "a", "b", "")] == ["b", "unknown", "a", "b", "unknown"]
    assert BoundedLabel()("x" * 201) == "unknown"


def test_generations(registry: CollectorRegistry) -> None:
    metrics = GenerationMetrics(registry)
    model = metrics.model("smollm2")
    assert metrics.model("smollm2") is model
    model.load(ModelLoad("m", slots_used=2, slots_total=4, queued=3, kv_used_tokens=70, kv_cached_tokens=30))
    metrics.attempt()
    metrics.attempt("UNAVAILABLE")
    metrics.retry("UNAVAILABLE")
    metrics.retry("whatever a peer says")
    one = ("smollm2",)
    figures = {"queue_length": 3, "slots_used": 2, "slots_total": 4, "kv_used_tokens": 70, "kv_cached_tokens": 30}
    for name, value in figures.items():
        assert samples(registry, f"chorus_generation_{name}") == {one: value}
    assert samples(registry, "chorus_generation_attempts_total") == {("OK",): 1, ("UNAVAILABLE",): 1}
    assert samples(registry, "chorus_generation_retries_total") == {("UNAVAILABLE",): 1, ("unknown",): 1}


def test_a_machine_shows_what_its_devices_tell(registry: CollectorRegistry) -> None:
    metrics = MachineMetrics(registry)
    talkative = Gpu(0, "GPU-0", "big", 100, 40, utilization=0.5, temperature_celsius=61.0, throttled=True)
    metrics.measured(
        cpu_utilization=0.25,
        memory_total_bytes=1000,
        memory_available_bytes=600,
        gpus=[talkative, Gpu(1, "GPU-1", "silent", 100, 90)],
    )
    assert samples(registry, "chorus_machine_cpu_utilization") == {(): 0.25}
    assert samples(registry, "chorus_machine_memory_available_bytes") == {(): 600}
    assert samples(registry, "chorus_gpu_memory_free_bytes") == {("0", "GPU-0"): 40, ("1", "GPU-1"): 90}
    assert samples(registry, "chorus_gpu_utilization") == {("0", "GPU-0"): 0.5}
    assert samples(registry, "chorus_gpu_temperature_celsius") == {("0", "GPU-0"): 61}
    assert samples(registry, "chorus_gpu_throttled") == {("0", "GPU-0"): 1}


def test_a_stream_is_timed_by_delivery(registry: CollectorRegistry) -> None:
    timer = StreamTimer(GenerationMetrics(registry).model("m"), started=10.0)
    timer.token(10.5)
    for number in range(300):
        timer.token(11.0 + number, count=2)
    timer.close(prompt_tokens=7)
    timer.close()
    one = ("m",)
    assert timer.time_to_first_token == 0.5
    assert samples(registry, "chorus_generation_time_to_first_token_seconds_sum") == {one: 0.5}
    assert samples(registry, "chorus_generation_inter_token_gap_seconds_count") == {one: 300}
    assert samples(registry, "chorus_generation_inter_token_gap_seconds_sum") == {one: 299.5}
    assert samples(registry, "chorus_generation_prompt_tokens_total") == {one: 7}
    assert samples(registry, "chorus_generation_output_tokens_total") == {one: 601}


def test_a_stream_without_a_token_has_no_first_one(registry: CollectorRegistry) -> None:
    timer = StreamTimer(GenerationMetrics(registry).model("m"), started=0.0)
    timer.close(prompt_tokens=1)
    assert timer.time_to_first_token is None
    assert samples(registry, "chorus_generation_time_to_first_token_seconds_count") == {("m",): 0}


@given(st.lists(st.lists(st.integers(0, 200).map(lambda value: value / 64), max_size=20), max_size=5))
def test_a_batch_histogram_says_what_the_library_s_own_does(batches: list[list[float]]) -> None:
    buckets = (0.25, 0.5, 1.0, 2.0)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    cell = BatchHistogram("h", "A histogram.", "model", buckets, registry=ours).cell("m")
    reference = Histogram("h", "A histogram.", ["model"], buckets=buckets, registry=theirs).labels("m")
    for batch in batches:
        cell.observe_many(batch)
        for value in batch:
            reference.observe(value)

    def lines(registry: CollectorRegistry) -> list[bytes]:
        return [line for line in generate_latest(registry).splitlines() if b"_created" not in line]

    assert lines(ours) == lines(theirs)


def test_ages_of_leases_are_those_of_the_scrape(registry: CollectorRegistry) -> None:
    now = 100.0
    metrics = LeaseMetrics(registry, clock=lambda: now, limit=2)
    for runner, state in [("attic", RunnerState.READY), ("cellar", RunnerState.DRAINING), ("hall", RunnerState.READY)]:
        metrics.registered()
        metrics.heard(runner, state, now)
    now = 101.5
    metrics.heard("attic", RunnerState.READY, now)
    now = 102.0
    assert samples(registry, "chorus_registry_lease_age_seconds") == {("attic",): 0.5, ("cellar",): 2.0}
    assert samples(registry, "chorus_registry_runners") == {("starting",): 0, ("ready",): 2, ("draining",): 1}
    metrics.gone("cellar", expired=True)
    metrics.gone("hall", expired=False)
    assert samples(registry, "chorus_registry_lease_age_seconds") == {("attic",): 0.5}
    assert samples(registry, "chorus_registry_registrations_total") == {(): 3}
    assert samples(registry, "chorus_registry_lease_expirations_total") == {(): 1}


def test_every_metric_of_a_process_has_its_prefix_and_unit() -> None:
    registry = new_registry(service="runner", version="1.2.3")
    RpcMetrics(registry, [METHOD])
    GenerationMetrics(registry)
    LeaseMetrics(registry)
    names = {family.name for family in registry.collect()}
    ours = {name for name in names if not name.startswith(("process_", "python_gc_"))}
    assert {name for name in ours if not name.startswith("chorus_")} == set()
    assert registry.get_sample_value("chorus_build_info", {"service": "runner", "version": "1.2.3"}) == 1


def test_two_services_can_live_in_one_process() -> None:
    for service in ("registry", "runner"):
        registry = new_registry(service=service, version="1")
        RpcMetrics(registry, [METHOD]).call_started(METHOD)
        assert samples(registry, "chorus_rpc_in_flight") == {(LABEL,): 1}


def test_a_name_is_taken_once(registry: CollectorRegistry) -> None:
    GenerationMetrics(registry)
    with pytest.raises(ValueError, match="Duplicated"):
        GenerationMetrics(registry)


def test_who_has_no_slots_shows_none() -> None:
    registry = new_registry(service="coordinator", version="1")
    GenerationMetrics(registry).model("m").tokens(prompt=1, output=2)
    shown = generate_latest(registry).decode()
    assert 'output_tokens_total{model="m"} 2.0' in shown
    assert 'slots_total{model="m"}' not in shown
    assert 'queue_length{model="m"}' not in shown
