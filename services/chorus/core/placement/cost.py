"""What a request would cost on a runner: about the seconds until its answer is complete, as a sum of named terms."""

from __future__ import annotations

from typing import TypeAlias

from chorus.core.fleet.records import EngineInfo, EngineKind, Gpu, ModelLoad, ModelState, ModelStatus, RunnerRecord
from chorus.core.placement.fit import Seat, Situation, load_of, slots_of
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
# A prompt's tokens are computed many at once: where reading was never measured, it is so much faster than writing.
READING_SPEEDUP = 10.0
# Embeddings, scores and counts, which are over soon.
SHORT_WORK_S = 0.05
# A prompt that will probably not fit costs a refusal and another attempt.
MISFIT_S = 30.0
# A paid provider is asked when nobody else can answer soon.
EXTERNAL_S = 60.0
# A GPU that throttles is slower than what was measured lately says; one that is hot will soon throttle.
THROTTLED_SLOWDOWN = 0.5
HOT_CELSIUS = 80.0
HOTTEST_CELSIUS = 95.0
HOT_SLOWDOWN = 0.25
# Background work goes where it is in nobody's way, if it can.
BUSY_SHARE = 0.8
BACKGROUND_BUSY_S = 60.0


# Found sooner than an enum's member, which every candidate of every decision asks for.
_LOADED = ModelState.LOADED
_EXTERNAL = EngineKind.EXTERNAL
_GENERATE = Work.GENERATE


def cost_terms(needs: Needs, record: RunnerRecord, seat: Seat, situation: Situation) -> Terms:
    """The terms of the cost of serving `needs` with one model of a runner that fits; each in seconds, none negative.

    `decode`: the answer at the rate measured there (or guessed from the model's size, where nothing ran yet).
    `prefill`: reading what is not in memory there of the prompt. `slots`: how much streams beside it slow it down.
    `queue`: waiting for a slot. `background`: it would be in the way of others. `kv`: waiting for room in the KV
    memory. `load`: reading the model from disk. `heat`: a GPU that throttles or will. `context`: the prompt may turn
    out too long. `failures`: the penalty of the situation. `external`: it costs money. `weight`: the runner is
    configured to be asked less. (`place` adds `precision`, which only a comparison can tell.)
    """
    runner_id = record.runner.runner_id
    status, load, busy = seat
    slots = slots_of(status, load)
    engine = engine_of(record, status)
    rate = _rate(record, status, load, engine)
    terms: list[tuple[str, float]] = []
    typical_s = service_s = SHORT_WORK_S
    if needs.work is _GENERATE:
        typical_s = NOMINAL_TOKENS / rate
        service_s = needs.answer_tokens / rate if 0 < needs.answer_tokens < NOMINAL_TOKENS else typical_s
        terms.append(("decode", service_s))
        if needs.likely_prompt_tokens:
            prefill_s = _prefill_seconds(needs, status, load, rate, runner_id, situation)
            service_s += prefill_s
            terms.append(("prefill", prefill_s))
    if busy:
        terms.append(("slots", CROWDING * service_s * (busy / slots if busy < slots else 1.0)))
        if busy >= slots:
            terms.append(("queue", typical_s * (busy - slots + 1) / slots))
        if needs.background and busy >= BUSY_SHARE * slots:
            terms.append(("background", BACKGROUND_BUSY_S))
    if load is not None and load.kv_total_tokens:
        kv_s = _kv_seconds(needs, load, typical_s)
        if kv_s:
            terms.append(("kv", kv_s))
    if status.state is not _LOADED:
        terms.append(("load", load_seconds(status)))
    gpus = record.load.gpus or record.node.gpus
    if gpus and engine is not None and is_on_gpu(engine):
        heat_s = service_s * max(map(_slowdown, gpus))
        if heat_s:
            terms.append(("heat", heat_s))
    if needs.likely_context_length > status.context_length > 0:
        terms.append(("context", MISFIT_S))
    if runner_id in situation.penalties:
        terms.append(("failures", situation.penalties[runner_id]))
    if engine is not None and engine.kind is _EXTERNAL:
        terms.append(("external", EXTERNAL_S))
    if situation.weights:
        weight = situation.weights.get(runner_id, 1.0)
        if weight < 1.0:
            terms.append(("weight", total(tuple(terms)) * (1.0 / weight - 1.0)))
    return tuple(terms)


def total(terms: Terms) -> float:
    """The cost that terms add up to."""
    cost = 0.0
    for _, value in terms:
        cost += value
    return cost


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
    on_gpu = fits_gpu and is_on_gpu(engine)
    return min(GUESSED_TOKENS_PER_S_MAX, (GPU_BYTES_PER_S if on_gpu else CPU_BYTES_PER_S) / size)


def wait_seconds(record: RunnerRecord, status: ModelStatus, situation: Situation) -> float:
    """How long until a full runner likely has a place: one request's service time over its slots."""
    load = load_of(record, status)
    service_s = NOMINAL_TOKENS / _rate(record, status, load, engine_of(record, status))
    return service_s / slots_of(status, load) + situation.penalties.get(record.runner.runner_id, 0.0)


def _rate(record: RunnerRecord, status: ModelStatus, load: ModelLoad | None, engine: EngineInfo | None) -> float:
    """Tokens a second of one stream: as measured there, else a guess."""
    rate = load.tokens_per_second if load is not None else 0.0
    return rate if rate > 0.0 else guessed_rate(record, status, engine)


def _prefill_seconds(
    needs: Needs, status: ModelStatus, load: ModelLoad | None, rate: float, runner_id: str, situation: Situation
) -> float:
    """Reading the prompt, but for what is in memory there: never more than the runner says that it has at all."""
    tokens = needs.likely_prompt_tokens
    if situation.shared:
        shared = situation.shared.get((runner_id, status.artifact.name), 0)
        if shared and load is not None and load.kv_total_tokens:
            shared = min(shared, load.kv_used_tokens + load.kv_cached_tokens)
        tokens -= min(shared, tokens)
    reading = load.prompt_tokens_per_second if load is not None else 0.0
    return tokens / (reading if reading > 0.0 else READING_SPEEDUP * rate)


def _kv_seconds(needs: Needs, load: ModelLoad, typical_s: float) -> float:
    """Waiting until enough of what runs there has ended to make room; what is merely cached makes room at once."""
    used = load.kv_used_tokens
    lacking = needs.likely_context_length + used - load.kv_total_tokens
    if lacking <= 0 or used <= 0:
        return 0.0
    return typical_s * min(1.0, lacking / used)


def _slowdown(gpu: Gpu) -> float:
    """By what share a GPU's heat makes it slower than it was; unknown temperatures are cool."""
    if not gpu.usable:
        return 0.0
    if gpu.throttled:
        return THROTTLED_SLOWDOWN
    if gpu.temperature_celsius is None or gpu.temperature_celsius <= HOT_CELSIUS:
        return 0.0
    return HOT_SLOWDOWN * min(1.0, (gpu.temperature_celsius - HOT_CELSIUS) / (HOTTEST_CELSIUS - HOT_CELSIUS))


def is_on_gpu(engine: EngineInfo) -> bool:
    """Whether an engine computes on graphics devices."""
    return any(backend != "cpu" for backend in engine.backends)


def engine_of(record: RunnerRecord, status: ModelStatus) -> EngineInfo | None:
    """The engine that has a model; None where the runner does not describe it."""
    for engine in record.runner.engines:
        if engine.name == status.engine:
            return engine
    return None
