"""What a request would cost on a runner: about the seconds until its answer is complete, as a sum of named terms."""

from __future__ import annotations

from typing import TypeAlias

from chorus.core.fleet.records import EngineInfo, EngineKind, ModelState, ModelStatus, RunnerRecord
from chorus.core.placement.fit import Situation, demand, load_of, slots_of
from chorus.core.placement.needs import Needs, Work

Terms: TypeAlias = tuple[tuple[str, float], ...]

# The answer whose seconds are counted. Its length is not known beforehand; runners are only compared by it.
NOMINAL_TOKENS = 256
# A stream among others is slower than one alone: by this share where all slots are taken.
CROWDING = 0.5
# Reading weights from disk, and what a load costs besides: memory that other models then lack.
LOAD_BYTES_PER_S = 500e6
LOAD_FIXED_S = 10.0
# Decoding reads all weights once per token, so the memory's bandwidth is a guess at the speed of what never ran.
CPU_BYTES_PER_S = 20e9
GPU_BYTES_PER_S = 300e9
GUESSED_TOKENS_PER_S_MAX = 100.0
# Of a model whose size nobody tells.
UNKNOWN_TOKENS_PER_S = 20.0
# A prompt that will probably not fit costs a refusal and another attempt.
MISFIT_S = 30.0
# A paid provider is asked when nobody else can answer soon.
EXTERNAL_S = 60.0


def cost_terms(needs: Needs, record: RunnerRecord, status: ModelStatus, situation: Situation) -> Terms:
    """The terms of the cost of serving `needs` with one model of a runner that fits; each in seconds, none negative.

    `decode`: the answer at the rate measured there (or guessed from the model's size, where nothing ran yet).
    `slots`: how much streams beside it slow it down. `queue`: waiting for a slot. `load`: reading the model from disk.
    `context`: the prompt may turn out too long. `failures`: the penalty of the situation. `external`: it costs money.
    """
    load = load_of(record, status)
    slots = slots_of(status, load)
    busy = demand(record, status, situation)
    rate = load.tokens_per_second if load is not None and load.tokens_per_second > 0 else 0.0
    engine = _engine_of(record, status)
    decode_s = NOMINAL_TOKENS / (rate or guessed_rate(record, status, engine)) if needs.work is Work.GENERATE else 0.0
    service_s = decode_s or 0.05
    terms: list[tuple[str, float]] = [("decode", decode_s)]
    if busy:
        terms.append(("slots", CROWDING * service_s * min(1.0, busy / slots)))
    if busy >= slots:
        terms.append(("queue", service_s * (busy - slots + 1) / slots))
    if status.state is not ModelState.LOADED:
        terms.append(("load", load_seconds(status)))
    if needs.likely_context_length > status.context_length > 0:
        terms.append(("context", MISFIT_S))
    penalty = situation.penalties.get(record.runner.runner_id, 0.0)
    if penalty:
        terms.append(("failures", penalty))
    if engine is not None and engine.kind is EngineKind.EXTERNAL:
        terms.append(("external", EXTERNAL_S))
    return tuple(terms)


def total(terms: Terms) -> float:
    """The cost that terms add up to."""
    return sum(value for _, value in terms)


def load_seconds(status: ModelStatus) -> float:
    """How long a model's load will go on: half of it where it has begun."""
    whole = LOAD_FIXED_S + status.artifact.size_bytes / LOAD_BYTES_PER_S
    return whole / 2 if status.state is ModelState.LOADING else whole


def guessed_rate(record: RunnerRecord, status: ModelStatus, engine: EngineInfo | None) -> float:
    """Tokens a second that one stream may get where none was measured."""
    size = status.artifact.size_bytes
    if size <= 0 or engine is None or engine.kind is not EngineKind.LOCAL:
        return UNKNOWN_TOKENS_PER_S
    fits_gpu = any(gpu.usable and gpu.memory_total_bytes > size for gpu in record.node.gpus)
    on_gpu = fits_gpu and any(backend != "cpu" for backend in engine.backends)
    return min(GUESSED_TOKENS_PER_S_MAX, (GPU_BYTES_PER_S if on_gpu else CPU_BYTES_PER_S) / size)


def wait_seconds(record: RunnerRecord, status: ModelStatus, situation: Situation) -> float:
    """How long until a full runner likely has a place: one request's service time over its slots."""
    load = load_of(record, status)
    rate = load.tokens_per_second if load is not None and load.tokens_per_second > 0 else 0.0
    service_s = NOMINAL_TOKENS / (rate or guessed_rate(record, status, _engine_of(record, status)))
    return service_s / slots_of(status, load) + situation.penalties.get(record.runner.runner_id, 0.0)


def _engine_of(record: RunnerRecord, status: ModelStatus) -> EngineInfo | None:
    for engine in record.runner.engines:
        if engine.name == status.engine:
            return engine
    return None
