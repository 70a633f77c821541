"""What is measured, in which order: coordinate descent, one property at a time, each starting from the best so far.

Threads come first, since they matter most and cost nothing; then batches, the KV type, and requantizations, which cost
time and disk. Threads and batches have one best value with worse ones to both sides, so a direction is left as soon as
a step in it loses. A candidate is measured in turns with the best so far, and dropped when it cannot win any more.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from operator import attrgetter
from typing import TypeAlias

from chorus.core.fitting.memory import CacheType
from chorus.core.tuning.figures import Figure, Loss, Quality, loss_of, paired_ratio
from chorus.core.tuning.variant import Record, Sample, Variant

LEAST_GAIN = 0.03
"""A variant that is less than 3% faster is not faster: the next hour may tell the opposite."""
LEAST_SAVING = 0.10
"""A variant that is as fast is better if it takes a tenth less memory."""
_HOPELESS = 0.85  # what is that slow in a first turn is not measured again


class Axis(StrEnum):
    """A property that is tuned."""

    THREADS = "threads"
    BATCH = "batch"
    CACHE = "cache"
    QUANTIZATION = "quantization"


@dataclass(frozen=True, slots=True)
class Space:
    """What there is to choose from. `base` is how the model runs untuned; `memory_bytes` is what it may take."""

    base: Variant
    threads: tuple[int, ...] = ()
    batches: tuple[tuple[int, int], ...] = ()  # (batch, micro-batch), from small to large
    cache_types: tuple[CacheType, ...] = ()
    quantizations: tuple[str, ...] = ()
    memory_bytes: int = 1 << 62


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is put into it: seconds in all, turns per comparison, and the relative loss that counts as none."""

    budget_s: float = 300.0
    turns: int = 3
    tolerance: float = 0.01


@dataclass(frozen=True, slots=True)
class Measure:
    """A step of the search: measure the speed of a variant once."""

    variant: Variant


@dataclass(frozen=True, slots=True)
class Judge:
    """A step of the search: measure a variant's perplexity."""

    variant: Variant


Step: TypeAlias = Measure | Judge


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step: a sample, a quality, or why neither could be had; and the seconds since the beginning."""

    elapsed_s: float
    sample: Sample | None = None
    quality: Quality | None = None
    problem: str = ""


@dataclass(slots=True)
class Findings:
    """What the search has found so far. `best` loses nothing against `base`; it is `base` until something is better."""

    base: Variant
    best: Variant
    records: dict[Variant, Record] = field(default_factory=dict)
    skipped: list[Variant] = field(default_factory=list)  # there was no time for them

    def record(self, variant: Variant) -> Record:
        """What is known of a variant."""
        return self.records.setdefault(variant, Record(variant))

    def loss(self, variant: Variant) -> Loss | None:
        """What a variant's perplexity loses against the base's; None where that wasn't measured.

        Threads and batches don't change what is computed, so a perplexity stands for every variant that differs in
        them alone.
        """
        ours, theirs = self._quality(variant), self._quality(self.base)
        return loss_of(ours, theirs) if ours is not None and theirs is not None else None

    def gain(self, variant: Variant) -> float | None:
        """How many times as fast as the base a variant is, by medians; None where it wasn't measured."""
        ours, theirs = self.records.get(variant), self.records.get(self.base)
        if ours is None or theirs is None or not ours.samples or not theirs.samples:
            return None
        return ours.speed.median / theirs.speed.median

    def _quality(self, variant: Variant) -> Quality | None:
        for record in self.records.values():
            if record.quality is not None and _computes_alike(record.variant, variant):
                return record.quality
        return None


Search: TypeAlias = Generator[Step, Outcome, None]


def search(space: Space, effort: Effort, findings: Findings) -> Search:
    """Yields steps to carry out, wants the outcome of each sent in, and writes what it learns into `findings`.

    Ends early where the base itself cannot be measured, or the time is over. A step is begun only while there is time.
    """
    return _Descent(space, effort, findings).run()


class _OutOfTime(Exception):  # noqa: N818 - no error: it ends the search
    pass


class _Descent:
    def __init__(self, space: Space, effort: Effort, findings: Findings) -> None:
        self._space = space
        self._effort = effort
        self._findings = findings
        self._elapsed_s = 0.0
        self._pending: list[Variant] = []

    def run(self) -> Search:
        found = self._findings
        yield from self._measure(found.base)
        if found.record(found.base).problem:
            return
        yield from self._judge(found.base)
        for axis in Axis:
            self._pending = self._candidates(axis)
            try:
                yield from self._descend(axis)
            except _OutOfTime:
                later = [
                    variant for rest in list(Axis)[list(Axis).index(axis) + 1 :] for variant in self._candidates(rest)
                ]
                found.skipped = [v for v in (*self._pending, *later) if not found.record(v).gain]
                return

    def _candidates(self, axis: Axis) -> list[Variant]:
        """The variants that differ from the best so far in one property, from small to large."""
        best, space = self._findings.best, self._space
        every = {
            Axis.THREADS: [replace(best, threads=count) for count in sorted(space.threads)],
            Axis.BATCH: [
                replace(best, batch_tokens=batch, micro_batch_tokens=micro) for batch, micro in sorted(space.batches)
            ],
            Axis.CACHE: [replace(best, cache_type=kind) for kind in space.cache_types],
            Axis.QUANTIZATION: [replace(best, quantization=name) for name in space.quantizations],
        }
        return [variant for variant in dict.fromkeys(every[axis]) if variant != best]

    def _descend(self, axis: Axis) -> Search:
        best = self._findings.best
        if axis is Axis.THREADS or axis is Axis.BATCH:
            size = attrgetter("threads", "batch_tokens", "micro_batch_tokens")
            larger = [variant for variant in self._pending if size(variant) > size(best)]
            smaller = [variant for variant in self._pending if size(variant) < size(best)]
            yield from self._both_ways(larger, smaller[::-1])
        elif axis is Axis.CACHE:
            for candidate in list(self._pending):
                if candidate.cache_type is CacheType.Q8_0 or self._findings.best.cache_type is not best.cache_type:
                    yield from self._try(candidate, best=self._findings.best, judged=False)
        else:
            for candidate in list(self._pending):
                # Each is compared with the file as it is: whether a loss is worth it is for people to say.
                yield from self._try(candidate, best=best, judged=True)

    def _both_ways(self, *ways: list[Variant]) -> Search:
        """Goes each way until a step loses; where the first way was right, nothing is to be found on the other."""
        for way in ways:
            for candidate in way:
                yield from self._try(candidate, best=self._findings.best, judged=False)
                if self._findings.best != candidate:
                    break
            self._pending = [variant for variant in self._pending if variant not in way]
            if self._findings.best in way:
                return

    # --- one candidate ----------------------------------------------------------------------------------------------

    def _try(self, candidate: Variant, *, best: Variant, judged: bool) -> Search:
        """Compares a candidate with `best`; it becomes the best of all where it loses nothing and is better.

        Its perplexity is measured where that decides, or, if `judged`, in any case.
        """
        found = self._findings
        gain = yield from self._duel(candidate, best)
        self._pending = [variant for variant in self._pending if variant != candidate]
        if gain is None:
            return
        better = self._is_better(candidate, best, gain)
        if not _computes_alike(candidate, best) and (better or judged):
            yield from self._judge(candidate)
        loss = found.loss(candidate)
        if not better or loss is None or not loss.is_nothing(self._effort.tolerance):
            return
        leader = found.record(found.best).gain
        if found.best == best or leader is None or gain.median > leader.median:  # both were compared with `best`
            found.best = candidate

    def _duel(self, candidate: Variant, rival: Variant) -> Generator[Step, Outcome, Figure | None]:
        """Measures both in turns; None where the candidate can't be run."""
        found = self._findings
        ours: list[float] = []
        theirs: list[float] = []
        for turn in range(self._effort.turns):
            pair = (rival, candidate) if turn % 2 else (candidate, rival)  # neither is always the warmed-up one
            for variant in pair:
                yield from self._measure(variant)
                if found.record(variant).problem:
                    return None
            ours.append(found.record(candidate).samples[-1].speed)
            theirs.append(found.record(rival).samples[-1].speed)
            gain = found.record(candidate).gain = paired_ratio(ours, theirs)
            if gain.high < _HOPELESS or (turn and gain.high < 1.0):
                break
        return found.record(candidate).gain

    def _is_better(self, candidate: Variant, rival: Variant, gain: Figure) -> bool:
        if self._findings.record(candidate).memory_bytes > self._space.memory_bytes:
            return False
        if gain.median >= 1 + LEAST_GAIN and gain.low > 1:
            return True
        # Savings must not add up to a loss of speed, so the base is asked as well.
        as_fast = gain.median >= 1 - LEAST_GAIN and (self._findings.gain(candidate) or 0.0) >= 1 - LEAST_GAIN
        return as_fast and self._saves_memory(candidate, rival)

    def _saves_memory(self, candidate: Variant, rival: Variant) -> bool:
        ours, theirs = self._findings.record(candidate), self._findings.record(rival)
        return ours.memory_bytes <= (1 - LEAST_SAVING) * theirs.memory_bytes

    # --- steps ------------------------------------------------------------------------------------------------------

    def _measure(self, variant: Variant) -> Search:
        if self._elapsed_s >= self._effort.budget_s:
            raise _OutOfTime
        outcome = yield Measure(variant)
        record = self._findings.record(variant)
        self._elapsed_s = outcome.elapsed_s
        if outcome.sample is None:
            record.problem = outcome.problem or "it could not be measured"
        else:
            record.samples.append(outcome.sample)

    def _judge(self, variant: Variant) -> Search:
        # No time check: what won the measurements is not left undecided for the seconds that this takes.
        outcome = yield Judge(variant)
        record = self._findings.record(variant)
        self._elapsed_s = outcome.elapsed_s
        if outcome.quality is None:
            record.problem = outcome.problem or "its perplexity could not be measured"
        else:
            record.quality = outcome.quality


def _computes_alike(one: Variant, other: Variant) -> bool:
    return (one.cache_type, one.quantization) == (other.cache_type, other.quantization)
