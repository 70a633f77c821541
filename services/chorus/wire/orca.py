"""A runner's load in the form of ORCA (open request cost aggregation), which gRPC's and Envoy's balancers read.

The messages are those of `xds.data.orca.v3` and `xds.service.orca.v3`, described here in a pool of their own. The
package that carries them, xds-protos, installs 59 files over those of googleapis-common-protos and makes the namespace
`google` a package; and in the common pool ours would clash with it where somebody has it all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory
from google.protobuf.descriptor import ServiceDescriptor

from chorus.core.fleet.records import Gpu, Load

TRAILER = "endpoint-load-metrics-bin"
"""The trailing metadata in which a report travels with the answer to a request (gRFC A51)."""

_FIELD = descriptor_pb2.FieldDescriptorProto
_REPORT, _SERVICE = "xds.data.orca.v3", "xds.service.orca.v3"


def _report_file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="xds/data/orca/v3/orca_load_report.proto", package=_REPORT, syntax="proto3"
    )
    message = file.message_type.add(name="OrcaLoadReport")

    def number(name: str, field: int, kind: _FIELD.Type.ValueType = _FIELD.TYPE_DOUBLE) -> None:
        message.field.add(name=name, number=field, type=kind, label=_FIELD.LABEL_OPTIONAL, json_name=_json_name(name))

    def numbers(name: str, field: int) -> None:
        entry = message.nested_type.add(name=f"{_json_name('_' + name)}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_OPTIONAL)
        entry.field.add(name="value", number=2, type=_FIELD.TYPE_DOUBLE, label=_FIELD.LABEL_OPTIONAL)
        message.field.add(
            name=name,
            number=field,
            type=_FIELD.TYPE_MESSAGE,
            type_name=f".{_REPORT}.OrcaLoadReport.{entry.name}",
            label=_FIELD.LABEL_REPEATED,
            json_name=_json_name(name),
        )

    number("cpu_utilization", 1)
    number("mem_utilization", 2)
    number("rps", 3, _FIELD.TYPE_UINT64)  # deprecated: rps_fractional took its place
    numbers("request_cost", 4)
    numbers("utilization", 5)
    number("rps_fractional", 6)
    number("eps", 7)
    numbers("named_metrics", 8)
    number("application_utilization", 9)
    return file


def _service_file(report: str) -> descriptor_pb2.FileDescriptorProto:
    duration = duration_pb2.DESCRIPTOR.name
    file = descriptor_pb2.FileDescriptorProto(
        name="xds/service/orca/v3/orca.proto", package=_SERVICE, syntax="proto3", dependency=[report, duration]
    )
    request = file.message_type.add(name="OrcaLoadReportRequest")
    request.field.add(
        name="report_interval",
        number=1,
        type=_FIELD.TYPE_MESSAGE,
        type_name=".google.protobuf.Duration",
        label=_FIELD.LABEL_OPTIONAL,
        json_name="reportInterval",
    )
    request.field.add(
        name="request_cost_names",
        number=2,
        type=_FIELD.TYPE_STRING,
        label=_FIELD.LABEL_REPEATED,
        json_name="requestCostNames",
    )
    file.service.add(name="OpenRcaService").method.add(
        name="StreamCoreMetrics",
        input_type=f".{_SERVICE}.OrcaLoadReportRequest",
        output_type=f".{_REPORT}.OrcaLoadReport",
        server_streaming=True,
    )
    return file


def _json_name(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)
    report = _report_file()
    pool.AddSerializedFile(report.SerializeToString())
    pool.AddSerializedFile(_service_file(report.name).SerializeToString())
    return pool


_POOL = _pool()
SERVICE: ServiceDescriptor = _POOL.FindServiceByName(f"{_SERVICE}.OpenRcaService")
METHOD = f"/{SERVICE.full_name}/StreamCoreMetrics"
OrcaLoadReport: Any = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_REPORT}.OrcaLoadReport"))
OrcaLoadReportRequest: Any = message_factory.GetMessageClass(
    _POOL.FindMessageTypeByName(f"{_SERVICE}.OrcaLoadReportRequest")
)


def encode_report(
    load: Load,
    *,
    memory_total_bytes: int,
    requests_per_s: float,
    errors_per_s: float,
    request_cost: Mapping[str, float] | None = None,
) -> Any:
    """An OrcaLoadReport of a whole runner; `request_cost` is what the one request took that it is sent with.

    Slots, queue and KV memory are summed over the loaded models. The two rates of tokens are those of the slowest
    model, for one stream. Shares are 0 to 1.
    """
    slots_used = sum(model.slots_used for model in load.models)
    slots_total = sum(model.slots_total for model in load.models)
    kv_used = sum(model.kv_used_tokens for model in load.models)
    kv_total = sum(model.kv_total_tokens for model in load.models)
    metrics: dict[str, float] = {
        "models_loaded": len(load.models),
        "slots_used": slots_used,
        "slots_free": max(slots_total - slots_used, 0),
        "queued": sum(model.queued for model in load.models),
        "kv_used": kv_used,
        "kv_total": kv_total,
        "kv_cached": sum(model.kv_cached_tokens for model in load.models),
        "tokens_per_second": _slowest(model.tokens_per_second for model in load.models),
        "prompt_tokens_per_second": _slowest(model.prompt_tokens_per_second for model in load.models),
        "preemptions": sum(model.preemptions for model in load.models),
        "memory_available_bytes": load.memory_available_bytes,
    }
    shares = {"slots": _share(slots_used, slots_total), "kv": _share(kv_used, kv_total)}
    for gpu in load.gpus:
        _add_gpu(gpu, shares, metrics)
    return OrcaLoadReport(
        cpu_utilization=load.cpu_utilization,
        mem_utilization=_share(memory_total_bytes - load.memory_available_bytes, memory_total_bytes),
        application_utilization=shares["slots"],
        rps_fractional=requests_per_s,
        eps=errors_per_s,
        utilization=shares,
        named_metrics=metrics,
        request_cost=dict(request_cost or {}),
    )


def decode_interval_s(request: Any) -> float:
    """How many seconds apart a caller wants his reports; 0 where he does not say."""
    interval = request.report_interval
    return float(interval.seconds + interval.nanos * 1e-9)


def _add_gpu(gpu: Gpu, shares: dict[str, float], metrics: dict[str, float]) -> None:
    name = f"gpu.{gpu.index}"
    if gpu.memory_total_bytes:
        shares[f"{name}.memory"] = _share(gpu.memory_total_bytes - gpu.memory_free_bytes, gpu.memory_total_bytes)
        metrics[f"{name}.memory_free_bytes"] = gpu.memory_free_bytes
    if gpu.utilization is not None:
        shares[f"{name}.utilization"] = metrics[f"{name}.utilization"] = gpu.utilization
    if gpu.temperature_celsius is not None:
        metrics[f"{name}.temperature_celsius"] = gpu.temperature_celsius
    if gpu.throttled is not None:
        metrics[f"{name}.throttled"] = float(gpu.throttled)


def _share(part: float, whole: float) -> float:
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0


def _slowest(rates: Iterable[float]) -> float:
    return min((rate for rate in rates if rate > 0), default=0.0)
