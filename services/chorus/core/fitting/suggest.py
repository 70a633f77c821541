"""Which models suit a machine, and why: a decision over what the machine has and what each model needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from chorus.core.fitting.memory import MemoryEstimate
from chorus.core.fleet.records import Gpu, Node, Tier

GIB = 1 << 30
PURPOSES = ("chat", "code", "embedding")

# What is left alone for the system and other programs: the larger of a fixed part and a share.
_SYSTEM_RESERVE_BYTES = GIB
_SYSTEM_RESERVE_SHARE = 0.2
_GPU_RESERVE_BYTES = GIB // 2
_GPU_RESERVE_SHARE = 0.06

# Every token reads all weights once, so memory bandwidth bounds the speed on a CPU. Rules of thumb for desktop memory.
_BANDWIDTH_PER_CORE = 5e9
_BANDWIDTH_MAX = 30e9
_COMFORTABLE_TOKENS_PER_S = 5.0


class Verdict(StrEnum):
    """How well a model suits a machine."""

    RECOMMENDED = "recommended"
    FITS = "fits"
    TOO_BIG = "too big"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that could be loaded, with the memory that it would need then."""

    family: str
    artifact: str
    quantization: str
    parameter_count: int
    size_bytes: int
    tier: Tier
    tags: tuple[str, ...]
    context_tokens: int
    memory: MemoryEstimate


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What is thought of one candidate. `fits_now` says whether the memory is free at this moment, too."""

    candidate: Candidate
    verdict: Verdict
    place: str  # where it would run, such as `GPU 0`; empty where it fits nowhere
    needed_bytes: int
    budget_bytes: int  # of that place, or the largest there is
    fits_now: bool
    why: str


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    budget_bytes: int
    free_bytes: int
    bandwidth: float | None  # bytes per second; None where speed is no worry


def suggest(node: Node, candidates: Sequence[Candidate]) -> tuple[Suggestion, ...]:
    """Judges every candidate for `node`: recommended ones first, then what fits, the most capable first.

    Recommended is, for each purpose (chat, code, embedding), the most capable model that fits and answers at a
    comfortable speed; where none does for chat, the fastest that fits, since everybody wants one.
    """
    places = _places(node)
    judged = [(candidate, _first_fit(candidate, places)) for candidate in candidates]
    best = _recommended(judged)
    suggestions = [
        _too_big(candidate, places) if place is None else _fitting(candidate, place, best.get(_key(candidate), ()))
        for candidate, place in judged
    ]
    order = list(Verdict)
    return tuple(
        sorted(
            suggestions,
            key=lambda s: (order.index(s.verdict), -s.candidate.parameter_count, -s.candidate.size_bytes),
        )
    )


def describe_bytes(count: int) -> str:
    """A size for people, such as `1.4 GiB` or `98 MiB`."""
    if count >= GIB:
        return f"{count / GIB:.1f} GiB"
    return f"{count / (1 << 20):.0f} MiB"


def _places(node: Node) -> list[_Place]:
    """Where a model could run, the fastest first."""
    cores = max(node.cpu.physical_cores, 1)
    bandwidth = min(cores * _BANDWIDTH_PER_CORE, _BANDWIDTH_MAX)
    cpu = _Place(
        "CPU",
        max(
            0, node.memory_total_bytes - _reserve(node.memory_total_bytes, _SYSTEM_RESERVE_BYTES, _SYSTEM_RESERVE_SHARE)
        ),
        node.memory_available_bytes,
        bandwidth,
    )
    gpus = sorted((gpu for gpu in node.gpus if gpu.usable), key=_gpu_budget, reverse=True)
    places = [_Place(f"GPU {gpu.index}", _gpu_budget(gpu), gpu.memory_free_bytes, None) for gpu in gpus[:1]]
    if len(gpus) > 1:
        names = "+".join(str(gpu.index) for gpu in sorted(gpus, key=lambda gpu: gpu.index))
        places.append(
            _Place(f"GPUs {names}", sum(map(_gpu_budget, gpus)), sum(gpu.memory_free_bytes for gpu in gpus), None)
        )
    places.append(cpu)
    if gpus:
        fastest = places[-2]
        places.append(
            _Place(
                f"{fastest.name} and CPU",
                fastest.budget_bytes + cpu.budget_bytes,
                fastest.free_bytes + cpu.free_bytes,
                bandwidth,
            )
        )
    return places


def _reserve(total: int, fixed: int, share: float) -> int:
    return max(fixed, int(total * share))


def _gpu_budget(gpu: Gpu) -> int:
    reserve = _reserve(gpu.memory_total_bytes, _GPU_RESERVE_BYTES, _GPU_RESERVE_SHARE)
    return max(0, gpu.memory_total_bytes - reserve)


def _first_fit(candidate: Candidate, places: Sequence[_Place]) -> _Place | None:
    needed = candidate.memory.total_bytes
    return next((place for place in places if needed <= place.budget_bytes), None)


def _key(candidate: Candidate) -> tuple[str, str]:
    return (candidate.family, candidate.artifact)


def _tokens_per_s(candidate: Candidate, place: _Place) -> float | None:
    """The most that memory bandwidth allows; None where it is no worry: a GPU, or a model that generates nothing."""
    if place.bandwidth is None or "embedding" in candidate.tags:
        return None
    return place.bandwidth / max(candidate.memory.weights_bytes, 1)


def _comfortable(candidate: Candidate, place: _Place) -> bool:
    rate = _tokens_per_s(candidate, place)
    return rate is None or rate >= _COMFORTABLE_TOKENS_PER_S


def _recommended(judged: Sequence[tuple[Candidate, _Place | None]]) -> dict[tuple[str, str], tuple[str, ...]]:
    """A candidate's key -> the purposes for which it is the one to take."""
    best: dict[tuple[str, str], tuple[str, ...]] = {}
    for purpose in PURPOSES:
        fitting = [(c, place) for c, place in judged if place is not None and purpose in c.tags]
        if not fitting:
            continue
        comfortable = [c for c, place in fitting if _comfortable(c, place)]
        if comfortable:
            chosen = max(comfortable, key=lambda c: (c.parameter_count, c.size_bytes))
        elif purpose == "chat":
            chosen = min((c for c, _ in fitting), key=lambda c: c.memory.weights_bytes)
        else:
            continue
        best[_key(chosen)] = (*best.get(_key(chosen), ()), purpose)
    return best


def _fitting(candidate: Candidate, place: _Place, purposes: Sequence[str]) -> Suggestion:
    needed = candidate.memory.total_bytes
    reasons = [f"best for {' and '.join(purposes)} here"] if purposes else []
    rate = _tokens_per_s(candidate, place)
    if rate is not None and rate < _COMFORTABLE_TOKENS_PER_S:
        reasons.append(f"slow there: about {max(rate, 0.1):.1f} tokens/s at most")
    fits_now = needed <= place.free_bytes
    if not fits_now:
        reasons.append(f"only {describe_bytes(place.free_bytes)} of {place.name} memory is free now")
    return Suggestion(
        candidate=candidate,
        verdict=Verdict.RECOMMENDED if purposes else Verdict.FITS,
        place=place.name,
        needed_bytes=needed,
        budget_bytes=place.budget_bytes,
        fits_now=fits_now,
        why="; ".join(reasons) or f"fits {place.name}",
    )


def _too_big(candidate: Candidate, places: Sequence[_Place]) -> Suggestion:
    needed = candidate.memory.total_bytes
    largest = max(places, key=lambda place: place.budget_bytes)
    return Suggestion(
        candidate=candidate,
        verdict=Verdict.TOO_BIG,
        place="",
        needed_bytes=needed,
        budget_bytes=largest.budget_bytes,
        fits_now=False,
        why=f"needs {describe_bytes(needed)}; {largest.name} can give {describe_bytes(largest.budget_bytes)}",
    )
