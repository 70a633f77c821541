"""A machine that exists in arithmetic alone: how fast a variant runs on it, and what it takes and loses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from chorus.core.fitting.memory import CacheType
from chorus.core.tuning.figures import Quality
from chorus.core.tuning.search import Effort, Findings, Judge, Measure, Outcome, Space, search
from chorus.core.tuning.variant import Sample, Variant

BASE = Variant(threads=2)
BLOCKS = 32


@dataclass
class Machine:
    """Each property multiplies speed (`speeds`), memory (`sizes`) and adds nats of loss (`losses`); 1, 1, 0 if absent.

    `noise` is how far a measurement may be off, relative to it; `broken` variants end with a problem.
    """

    speeds: dict[object, float] = field(default_factory=dict)
    sizes: dict[object, float] = field(default_factory=dict)
    losses: dict[object, float] = field(default_factory=dict)
    noise: float = 0.0
    step_s: float = 1.0
    broken: Callable[[Variant], bool] = lambda _: False
    rng: Random = field(default_factory=lambda: Random(1))
    steps: list[Measure | Judge] = field(default_factory=list)

    def properties(self, variant: Variant) -> tuple[object, ...]:
        return (
            variant.threads,
            (variant.batch_tokens, variant.micro_batch_tokens),
            variant.cache_type,
            variant.quantization,
        )

    def true_speed(self, variant: Variant) -> float:
        speed = 100.0
        for each in self.properties(variant):
            speed *= self.speeds.get(each, 1.0)
        return speed

    def true_loss(self, variant: Variant) -> float:
        return sum(self.losses.get(each, 0.0) for each in self.properties(variant))

    def memory(self, variant: Variant) -> int:
        size = 1_000_000_000.0
        for each in self.properties(variant):
            size *= self.sizes.get(each, 1.0)
        return int(size)

    def carry_out(self, step: Measure | Judge) -> Outcome:
        self.steps.append(step)
        elapsed = len(self.steps) * self.step_s
        if self.broken(step.variant):
            return Outcome(elapsed, problem="llama.cpp ended it")
        if isinstance(step, Judge):
            text = Random(7)
            loss = self.true_loss(step.variant)
            return Outcome(elapsed, quality=Quality(tuple(3 + text.gauss(0, 0.3) + loss for _ in range(BLOCKS))))
        speed = self.true_speed(step.variant) * (1 + self.rng.uniform(-self.noise, self.noise))
        return Outcome(elapsed, sample=Sample(4 * speed, speed, 2 * speed, self.memory(step.variant)))


def tune(machine: Machine, space: Space, effort: Effort | None = None) -> Findings:
    """Runs a whole search on `machine`."""
    findings = Findings(base=space.base, best=space.base)
    steps = search(space, effort or Effort(budget_s=1e9), findings)
    try:
        step = next(steps)
        while True:
            step = steps.send(machine.carry_out(step))
    except StopIteration:
        return findings


def whole_space(**changes: object) -> Space:
    """Everything that can be tuned, around `BASE`."""
    defaults: dict[str, object] = {
        "base": BASE,
        "threads": (1, 2, 4, 8),
        "batches": ((512, 128), (512, 256), (512, 512), (1024, 1024)),
        "cache_types": (CacheType.Q8_0, CacheType.Q4_0),
        "quantizations": ("Q8_0", "Q4_0"),
    }
    return Space(**{**defaults, **changes})  # type: ignore[arg-type]
