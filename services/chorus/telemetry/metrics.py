"""What a process counts and measures, for Prometheus.

Each process has a registry of its own (`new_registry`), never the library's global one, so that several services can
live in one process. Durations are seconds. Labels are bounded: see `BoundedLabel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, ProcessCollector

from chorus.core.errors import ChorusError
from chorus.core.fleet.records import Gpu, ModelLoad
from chorus.telemetry.histogram import BatchHistogram, BoundedLabel, HistogramCell

GRPC_CODES = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED"),
    *("INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
)
# From a call answered out of memory to a long generation.
_CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)


def new_registry(*, service: str, version: str) -> CollectorRegistry:
    """Returns a registry for one process, with its memory, processor time and garbage collection in it already."""
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    build = Gauge(
        "chorus_build_info", "What runs here; the value is always 1.", ["service", "version"], registry=registry
    )
    build.labels(service, version).set(1)
    return registry


def error_reasons() -> list[str]:
    """The reasons of all errors of the tree: what a label may be."""
    found, tree = [], [ChorusError]
    while tree:
        error = tree.pop()
        found.append(error.reason)
        tree += error.__subclasses__()
    return found


class RpcMetrics:
    """The calls that a server answered; what `transport`'s interceptor takes as its observer.

    `methods` are the full names that are served, such as `chorus.api.runner.v1.ModelRunner/Generate`; where none are
    given, the first 256 that come are kept.
    """

    def __init__(self, registry: CollectorRegistry, methods: Iterable[str] = ()) -> None:
        known = [method.lstrip("/") for method in methods]
        self._method = BoundedLabel(known, limit=len(known) or 256)
        self._code = BoundedLabel(GRPC_CODES, limit=0)
        self._reason = BoundedLabel(error_reasons(), limit=0)
        self._requests = Counter(
            "chorus_rpc_requests_total", "Calls that have ended.", ["method", "code"], registry=registry
        )
        self._errors = Counter(
            "chorus_rpc_errors_total",
            "Calls that failed, by the error's reason.",
            ["method", "reason"],
            registry=registry,
        )
        self._in_flight = Gauge(
            "chorus_rpc_in_flight", "Calls that are being handled now.", ["method"], registry=registry
        )
        self._seconds = Histogram(
            "chorus_rpc_duration_seconds",
            "Time from a call's arrival to its end.",
            ["method"],
            buckets=_CALL_BUCKETS,
            registry=registry,
        )
        # Looking a label up takes locks; each is looked up once.
        self._by_method: dict[str, tuple[Gauge, Histogram]] = {}
        self._by_code: dict[tuple[str, str], Counter] = {}

    def call_started(self, method: str) -> None:
        """A call of `method` has arrived."""
        self._of_method(self._method(method.lstrip("/")))[0].inc()

    def call_finished(self, method: str, code: str | Enum, reason: str, seconds: float) -> None:
        """It has ended with the gRPC status `code`; `reason` is the error's, or empty."""
        label = self._method(method.lstrip("/"))
        name = self._code(code if isinstance(code, str) else code.name)
        in_flight, duration = self._of_method(label)
        in_flight.dec()
        duration.observe(seconds)
        counter = self._by_code.get((label, name))
        if counter is None:
            counter = self._by_code[label, name] = self._requests.labels(label, name)
        counter.inc()
        if reason:
            self._errors.labels(label, self._reason(reason)).inc()

    def _of_method(self, label: str) -> tuple[Gauge, Histogram]:
        found = self._by_method.get(label)
        if found is None:
            found = self._by_method[label] = (self._in_flight.labels(label), self._seconds.labels(label))
        return found


class LoadGauges:
    """What a runner reports of each loaded model, as its heartbeats say it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, documentation: str) -> Gauge:
            return Gauge(f"chorus_generation_{name}", documentation, ["model"], registry=registry)

        self._gauges = {
            "queued": gauge("queue_length", "Requests that wait for a slot."),
            "slots_used": gauge("slots_used", "Slots in which a generation runs."),
            "slots_total": gauge("slots_total", "Slots that there are."),
            "kv_used_tokens": gauge("kv_used_tokens", "Tokens of running requests in the KV memory."),
            "kv_total_tokens": gauge("kv_total_tokens", "Tokens that the KV memory can hold."),
            "kv_cached_tokens": gauge("kv_cached_tokens", "Tokens of ended requests in the KV memory, to be shared."),
            "tokens_per_second": gauge("tokens_per_second", "Tokens a second of one stream, measured lately."),
            "prompt_tokens_per_second": gauge(
                "prompt_tokens_per_second", "Tokens of prompts read a second, measured lately."
            ),
            "preemptions": gauge("preemptions", "Requests that gave way to others, since the model was loaded."),
        }

    def set(self, label: str, load: ModelLoad) -> None:
        """Takes the load of the model that is called `label` here."""
        for name, gauge in self._gauges.items():
            gauge.labels(label).set(getattr(load, name))


class MachineMetrics:
    """The machine that a runner is on. A figure that a device does not tell is not shown."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, documentation: str, *labels: str) -> Gauge:
            return Gauge(f"chorus_{name}", documentation, labels, registry=registry)

        self._cpu = gauge("machine_cpu_utilization", "How busy the processor is, 0 to 1 over all cores.")
        self._memory_total = gauge("machine_memory_total_bytes", "Memory that this process may use, others included.")
        self._memory_available = gauge("machine_memory_available_bytes", "Memory that a new program could have.")
        self._gpu_memory_total = gauge("gpu_memory_total_bytes", "A graphics device's memory.", "gpu", "uuid")
        self._gpu_memory_free = gauge("gpu_memory_free_bytes", "A graphics device's free memory.", "gpu", "uuid")
        self._gpu_optional = {
            "utilization": gauge("gpu_utilization", "How busy a graphics device is, 0 to 1.", "gpu", "uuid"),
            "temperature_celsius": gauge("gpu_temperature_celsius", "A graphics device's temperature.", "gpu", "uuid"),
            "throttled": gauge("gpu_throttled", "1 while it runs slower for heat or power, else 0.", "gpu", "uuid"),
        }

    def measured(
        self, *, cpu_utilization: float, memory_total_bytes: int, memory_available_bytes: int, gpus: Iterable[Gpu]
    ) -> None:
        """Takes what was measured now."""
        self._cpu.set(cpu_utilization)
        self._memory_total.set(memory_total_bytes)
        self._memory_available.set(memory_available_bytes)
        for gpu in gpus:
            labels = (str(gpu.index), gpu.uuid)
            self._gpu_memory_total.labels(*labels).set(gpu.memory_total_bytes)
            self._gpu_memory_free.labels(*labels).set(gpu.memory_free_bytes)
            for name, gauge in self._gpu_optional.items():
                value = getattr(gpu, name)
                if value is not None:
                    gauge.labels(*labels).set(float(value))


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """One model's part of `GenerationMetrics`; get it once for each generation, or keep it."""

    _first_token: Histogram
    _gaps: HistogramCell
    _prompt_tokens: Counter
    _output_tokens: Counter
    _label: str
    _load: LoadGauges

    def first_token(self, seconds: float) -> None:
        """A generation's first token came `seconds` after the request."""
        self._first_token.observe(seconds)

    def gaps(self, seconds: Iterable[float]) -> None:
        """These were the times between the tokens of a generation."""
        self._gaps.observe_many(seconds)

    def tokens(self, *, prompt: int = 0, output: int = 0) -> None:
        """So many tokens were read, and so many generated."""
        self._prompt_tokens.inc(prompt)
        self._output_tokens.inc(output)

    def load(self, load: ModelLoad) -> None:
        """How things stand with the model now. Who never says so (a coordinator has no slots) shows no such figures."""
        self._load.set(self._label, load)


class GenerationMetrics:
    """What becomes of generations, on a runner or as a coordinator sees it; at most 64 models are told apart."""

    def __init__(self, registry: CollectorRegistry, models: Iterable[str] = ()) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"chorus_generation_{name}_total", documentation, labels, registry=registry)

        self._model = BoundedLabel(models)
        self._reason = BoundedLabel(error_reasons(), limit=0)
        self._first_token = Histogram(
            "chorus_generation_time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            ["model"],
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._gaps = BatchHistogram(
            "chorus_generation_inter_token_gap_seconds",
            "Time between two tokens of one generation.",
            "model",
            _GAP_BUCKETS,
            registry=registry,
        )
        self._prompt_tokens = counter("prompt_tokens", "Tokens read.", "model")
        self._output_tokens = counter("output_tokens", "Tokens generated.", "model")
        self._load = LoadGauges(registry)
        self._attempts = counter("attempts", "Tries of a request on a runner, by how they ended.", "outcome")
        self._retries = counter("retries", "Requests moved to another runner, by why they were.", "reason")
        self._breakers = counter("breakers", "Circuit breakers of a runner and model, by what they became.", "state")
        self._tickets = counter("tickets", "Tickets of direct mode, by how their places were freed.", "closing")
        self._hedges = counter("hedges", "Second attempts beside one that was late, by how they fared.", "outcome")
        self._by_model: dict[str, ModelMetrics] = {}

    def model(self, name: str) -> ModelMetrics:
        """Returns the part of one model."""
        label = self._model(name)
        found = self._by_model.get(label)
        if found is None:
            found = self._by_model[label] = ModelMetrics(
                self._first_token.labels(label),
                self._gaps.cell(label),
                self._prompt_tokens.labels(label),
                self._output_tokens.labels(label),
                label,
                self._load,
            )
        return found

    def attempt(self, reason: str = "") -> None:
        """A try of a request on a runner has ended: well, or for the reason given (`UNAVAILABLE`)."""
        self._attempts.labels(self._reason(reason) if reason else "OK").inc()

    def retry(self, reason: str) -> None:
        """A request goes to another runner because its try ended for this reason."""
        self._retries.labels(self._reason(reason)).inc()

    def breaker(self, state: str) -> None:
        """A circuit breaker opened (`open`), is tried with one request (`half_open`), or closed (`closed`)."""
        self._breakers.labels(state).inc()

    def hedge(self, outcome: str) -> None:
        """A second attempt `won` (its token came first), `lost`, or `failed`."""
        self._hedges.labels(outcome).inc()

    def ticket(self, closing: str) -> None:
        """The place that was kept for a ticket is free: its use `ended`, it was `unused`, `returned` or `lost`."""
        self._tickets.labels(closing).inc()


def admission_gauges(registry: CollectorRegistry, *, running: Callable[[], int], waiting: Callable[[], int]) -> None:
    """Exports how many requests a coordinator has under way and how many wait for their turn, as of each scrape."""
    gauge = Gauge(
        "chorus_admission_requests", "Requests that a coordinator has taken on.", ["state"], registry=registry
    )
    gauge.labels("running").set_function(running)
    gauge.labels("waiting").set_function(waiting)


class StreamTimer:
    """Times the tokens of one stream and hands the times over in batches; `now` is from one monotonic clock.

    Call `token()` for each token that is delivered and `close()` at the end, however it ends.
    """

    _BATCH = 128

    def __init__(self, metrics: ModelMetrics, started: float) -> None:
        self._metrics = metrics
        self._started = started
        self._last: float | None = None
        self._gaps: list[float] = []
        self._count = 0
        self.time_to_first_token: float | None = None

    def token(self, now: float, count: int = 1) -> None:
        """`count` tokens were delivered together at `now`: one gap, since nobody saw them apart."""
        if self._last is None:
            self.time_to_first_token = now - self._started
            self._metrics.first_token(self.time_to_first_token)
        else:
            self._gaps.append(now - self._last)
            if len(self._gaps) >= self._BATCH:
                self._flush()
        self._last = now
        self._count += count

    def close(self, *, prompt_tokens: int = 0) -> None:
        """The stream has ended; `prompt_tokens` were read for it. A second time does nothing more."""
        self._flush()
        self._metrics.tokens(prompt=prompt_tokens, output=self._count)
        self._count = 0

    def _flush(self) -> None:
        self._metrics.gaps(self._gaps)
        self._gaps.clear()
