"""From findings to a proposal: what to keep because it loses nothing, and what could be had for a loss."""

from __future__ import annotations

from dataclasses import dataclass

from chorus.core.tuning.search import LEAST_GAIN, Effort, Findings, Space
from chorus.core.tuning.variant import Variant


@dataclass(frozen=True, slots=True)
class Option:
    """A variant with what it gives: speed and memory relative to the base, and the relative change of perplexity."""

    variant: Variant
    gain: float
    memory_ratio: float
    loss: float
    error: float = 0.0  # the standard error of the loss


@dataclass(frozen=True, slots=True)
class Proposal:
    """`free` loses nothing; it is the base where nothing was better. `costly` are faster than it, for a loss.

    `reasons` are whole sentences about `free`, for people.
    """

    free: Option
    changes: bool
    reasons: tuple[str, ...]
    costly: tuple[Option, ...]

    def with_consent(self, accepted_loss: float) -> Option:
        """The fastest option whose loss is at most `accepted_loss` (0.2 is 20%)."""
        return max((self.free, *(o for o in self.costly if o.loss <= accepted_loss)), key=lambda option: option.gain)


def propose(findings: Findings, space: Space, effort: Effort) -> Proposal:
    """What to make of `findings`. Raises ValueError where the base was not measured."""
    free = _option(findings, findings.best)
    costly = []
    for variant, record in findings.records.items():
        loss = findings.loss(variant)
        if loss is None or record.problem or record.gain is None or record.memory_bytes > space.memory_bytes:
            continue
        option = _option(findings, variant)
        if option.gain >= free.gain * (1 + LEAST_GAIN) and not loss.is_nothing(effort.tolerance):
            costly.append(option)
    return Proposal(
        free=free,
        changes=findings.best != findings.base,
        reasons=_reasons(findings, free, effort),
        costly=tuple(sorted(costly, key=lambda option: option.loss)),
    )


def _option(findings: Findings, variant: Variant) -> Option:
    gain, loss = findings.gain(variant), findings.loss(variant)
    if gain is None:
        raise ValueError("it was not measured")
    memory = findings.record(variant).memory_bytes / max(findings.record(findings.base).memory_bytes, 1)
    if loss is None:
        return Option(variant, gain, memory, 0.0)
    return Option(variant, gain, memory, loss.change, loss.error)


def _reasons(findings: Findings, free: Option, effort: Effort) -> tuple[str, ...]:
    base, best = findings.base, free.variant
    if best == base:
        return ("Nothing that was measured is better without losing anything; it runs as it should already.",)
    changed = []
    if best.threads != base.threads:
        changed.append(f"{best.threads} threads instead of {base.threads}")
    if (best.batch_tokens, best.micro_batch_tokens) != (base.batch_tokens, base.micro_batch_tokens):
        changed.append(f"batches of {best.batch_tokens} tokens in pieces of {best.micro_batch_tokens}")
    if best.cache_type != base.cache_type:
        changed.append(f"KV memory as {best.cache_type} instead of {base.cache_type}")
    if best.quantization != base.quantization:
        changed.append(f"the file requantized to {best.quantization}")
    speed = f"{free.gain:.2f}x the speed in {free.memory_ratio:.2f}x the memory"
    reasons = [f"{_listed(changed)}: {speed}."]
    if findings.loss(best) is not None and (best.cache_type, best.quantization) != (base.cache_type, base.quantization):
        reasons.append(
            f"Perplexity changes by {free.loss:+.2%}, which counts as nothing lost (up to {effort.tolerance:.1%})."
        )
    return tuple(reasons)


def _listed(parts: list[str]) -> str:
    text = ", ".join(parts)
    return text[:1].upper() + text[1:]
