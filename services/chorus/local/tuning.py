"""Tuning one model for this machine: measuring what `core.tuning` asks for, and keeping what was agreed to."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import psutil

from chorus.config import RunnerSettings
from chorus.core.errors import ChorusError, EngineError, ModelFileError, OutOfMemoryError, UnsupportedFeatureError
from chorus.core.fitting.memory import LoadPlan
from chorus.core.fitting.suggest import describe_bytes
from chorus.core.tuning.candidates import file_bytes, space_for
from chorus.core.tuning.proposal import Option, Proposal, propose
from chorus.core.tuning.search import Axis, Effort, Findings, Judge, Measure, Outcome, Space, Step, search
from chorus.core.tuning.variant import Variant
from chorus.engine.llama.lab import Lab
from chorus.engine.llama.measuring import Workload
from chorus.engine.llama.settings import LlamaSettings, usable_threads
from chorus.hardware.cpu import read_cpu
from chorus.hardware.inventory import Inventory
from chorus.models import ModelStore, StoredArtifact, estimate, inspect
from chorus.models.digest import sha256_of
from chorus.models.manifest import Manifest
from chorus.models.naming import requantized_file
from chorus.models.progress import Reporter
from chorus.models.tuning import Machine, Tuning, TuningFolder
from chorus.runner.tuned import this_machine

_DEFAULT_CONTEXT = 4096
_RESERVE_BYTES = 256 << 20
_DISK_RESERVE_BYTES = 512 << 20
_PROMPT_TOKENS = (64, 1024)
_QUALITY_TOKENS = (512, 8192)


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """How much is measured. `seconds` is for each of a sample's figures, `quality_seconds` for a perplexity.

    `quality_tokens` and `cells` None are chosen by the model's speed, and by how a runner loads it.
    """

    effort: Effort = field(default_factory=Effort)
    seconds: float = 1.0
    quality_seconds: float = 20.0
    quality_tokens: int | None = None
    cells: int | None = None
    streams: int = 4
    axes: frozenset[Axis] = frozenset(Axis)
    threads: tuple[int, ...] | None = None  # instead of those that fit the machine


QUICK = TuneOptions(Effort(budget_s=60.0, turns=2), seconds=0.4, quality_seconds=4.0)
THOROUGH = TuneOptions()


@dataclass(frozen=True, slots=True)
class Now:
    """What is being done, and how far the time is spent."""

    words: str
    elapsed_s: float
    budget_s: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What was written: the file that tells runners how to run the model, and the model that was made, if one was."""

    tuning: Tuning
    path: Path
    artifact: StoredArtifact | None


class Tuner:
    """One tuning of one model. To be used as a context manager: what it made and nobody kept goes with it."""

    def __init__(
        self,
        store: ModelStore,
        stored: StoredArtifact,
        settings: RunnerSettings,
        options: TuneOptions,
        *,
        folder: TuningFolder | None = None,
        tell: Callable[[Now], None] = lambda _: None,
    ) -> None:
        self._store = store
        self.stored = stored
        self._settings = settings
        self._options = options
        self._folder = folder or TuningFolder()
        self._tell = tell
        self._lab = Lab(gpu_layers=settings.gpu_layers)
        self._held = contextlib.ExitStack()
        self._files: dict[str, Path] = {"": stored.path}
        self._made: dict[str, Path] = {}
        self._began = time.monotonic()
        self._machine: Machine | None = None
        self._work = Workload(cells=0, streams=options.streams)
        self._quality_tokens = options.quality_tokens or 0

    def __enter__(self) -> Tuner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lab.close()
        for path in self._made.values():
            path.unlink(missing_ok=True)
        self._held.close()

    # --- measuring --------------------------------------------------------------------------------------------------

    def run(self) -> tuple[Findings, Space, Proposal]:
        """Measures, which takes about as long as the effort says.

        Raises OutOfMemoryError, EngineError (it can't be measured), UnsupportedFeatureError (it generates nothing).
        """
        base = Variant(threads=self._settings.threads or LlamaSettings().thread_count())
        memory_bytes = self._require_memory()
        space = self._prepare(base, memory_bytes)
        findings = Findings(base=base, best=base)
        steps = search(space, self._options.effort, findings)
        try:
            step = next(steps)
            while True:
                step = steps.send(self._carry_out(step))
        except StopIteration:
            pass
        problem = findings.record(base).problem
        if problem:
            raise EngineError(f"{self.stored.artifact.name} cannot be measured: {problem}")
        return findings, space, propose(findings, space, self._options.effort)

    def _require_memory(self) -> int:
        """The bytes that a model may take."""
        with Inventory("tune") as inventory:
            available = inventory.node().memory_available_bytes - _RESERVE_BYTES
        plan = LoadPlan(context_tokens=self._context_tokens(), slots=self._options.streams)
        needed = estimate(self.stored.info, plan).total_bytes
        if needed > available and self._options.cells is None and not self._settings.gpu_layers:
            raise OutOfMemoryError(
                f"{self.stored.artifact.name} needs about {describe_bytes(needed)} for {self._options.streams} streams "
                f"of {plan.context_tokens} tokens, and {describe_bytes(max(available, 0))} are free; end what else "
                "runs (`chorus down`), or choose fewer --streams or a shorter runner.context_length",
                metadata={"required_bytes": str(needed), "available_bytes": str(available)},
            )
        return available

    def _prepare(self, base: Variant, memory_bytes: int) -> Space:
        """Looks at the model and chooses what suits its speed."""
        artifact, options = self.stored.artifact, self._options
        self._say(f"loading {artifact.name}")
        probe = self._lab.probe(self.stored.path)
        if not probe.facts["generates"]:
            raise UnsupportedFeatureError(
                f"{artifact.name} makes vectors or only encodes; `chorus tune` measures models that generate text"
            )
        self._machine = this_machine(
            gpu_layers=self._settings.gpu_layers, llama_build=probe.facts["build"], offloads=probe.facts["offloads"]
        )
        speed = probe.calibrate(base)
        self._work = replace(
            self._work,
            cells=options.cells or options.streams * self._context_tokens(),
            prompt_tokens=_power_of_two(speed * options.seconds, *_PROMPT_TOKENS),
            seconds=options.seconds,
        )
        if not self._quality_tokens:
            lowest, highest = _QUALITY_TOKENS
            self._quality_tokens = min(max(int(speed * options.quality_seconds), lowest), highest)
        cpu = read_cpu()
        space = space_for(
            base,
            physical_cores=cpu.physical_cores,
            usable_threads=usable_threads(),
            quantization=artifact.quantization,
            parameter_count=artifact.parameter_count,
            memory_bytes=memory_bytes,
            axes=options.axes,
        )
        # A batch larger than the prompts that are measured would look like any other.
        batches = tuple(sizes for sizes in space.batches if sizes[1] <= self._work.prompt_tokens)
        return replace(space, batches=batches, threads=options.threads or space.threads)

    def _context_tokens(self) -> int:
        wanted = self._settings.context_length or _DEFAULT_CONTEXT
        return min(wanted, self.stored.info.context_length or wanted)

    def _carry_out(self, step: Step) -> Outcome:
        variant = step.variant
        try:
            path = self._file(variant)
            if isinstance(step, Measure):
                self._say(f"{describe(variant)}: speed")
                sample = self._lab.probe(path).speed(variant, self._work)
                return Outcome(self._elapsed(), sample=sample)
            assert isinstance(step, Judge)
            self._say(f"{describe(variant)}: perplexity")
            quality = self._lab.probe(path).quality(variant, self._quality_tokens)
            return Outcome(self._elapsed(), quality=quality)
        except ChorusError as error:
            return Outcome(self._elapsed(), problem=error.message)

    def _say(self, words: str) -> None:
        self._tell(Now(words, self._elapsed(), self._options.effort.budget_s))

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    # --- requantized files ------------------------------------------------------------------------------------------

    def _file(self, variant: Variant) -> Path:
        """The file of a variant, made if need be. Raises what keeps it from being made."""
        known = self._files.get(variant.quantization)
        if known is not None:
            return known
        family, file = self.stored.artifact.family, self._file_name(variant.quantization)
        self._held.enter_context(
            self._store.exclusive(family, file, Reporter(lambda report: self._say(report.message or "waiting")))
        )
        present = self._present(family, file)
        if present is not None:
            self._files[variant.quantization] = present
            return present
        needed = file_bytes(variant.quantization, self.stored.artifact.parameter_count)
        free = shutil.disk_usage(self._store.directory).free
        if needed + _DISK_RESERVE_BYTES > free:
            raise ModelFileError(
                f"requantizing needs about {describe_bytes(needed)} of disk; {describe_bytes(free)} are free"
            )
        partial = self._store.partial_path(family, file)
        partial.unlink(missing_ok=True)  # of one that was killed
        self._say(f"requantizing to {variant.quantization}")
        self._made[variant.quantization] = partial
        self._lab.probe(self.stored.path).quantize(partial, variant.quantization, threads=usable_threads())
        self._files[variant.quantization] = partial
        return partial

    def _file_name(self, quantization: str) -> str:
        return requantized_file(self.stored.place.name, self.stored.artifact.quantization, quantization)

    def _origin(self, quantization: str) -> str:
        return f"requantized to {quantization} by chorus tune from SHA-256 {self.stored.artifact.sha256}"

    def _present(self, family: str, file: str) -> Path | None:
        """The file of an earlier tuning of the same model."""
        try:
            stored = self._store.lookup(family, file)
        except ModelFileError:
            return None
        same = stored is not None and self.stored.artifact.sha256 in stored.source
        return stored.path if stored is not None and same else None

    # --- keeping ----------------------------------------------------------------------------------------------------

    def keep(self, option: Option, findings: Findings) -> Kept:
        """Writes down how the model runs from now on, and makes a requantized file a model like any other.

        Raises ConfigError or DownloadError where it can't be written.
        """
        variant = option.variant
        if not variant.quantization:
            tuning = self._tuning(self.stored, variant, findings)
            return Kept(tuning, self._folder.keep(tuning), None)
        made = self._commit(variant)
        path = self._folder.keep(self._tuning(made, variant, findings))
        # The file as it was runs in the same way, and tells what to run in its place.
        original = self._tuning(self.stored, replace(variant, quantization=""), findings, instead=made.artifact.sha256)
        self._folder.keep(original)
        return Kept(original, path, made)

    def _commit(self, variant: Variant) -> StoredArtifact:
        quantization, artifact = variant.quantization, self.stored.artifact
        file = self._file_name(quantization)
        partial = self._made.get(quantization)
        if partial is not None:
            self._lab.dismiss(partial)
            self._say(f"verifying {file}")
            inspect(partial)
            stat = partial.stat()
            manifest = Manifest(
                family=artifact.family,
                file=file,
                sha256=sha256_of(partial),
                size_bytes=stat.st_size,
                mtime_ns=stat.st_mtime_ns,
                source=self._origin(quantization),
                license=artifact.license,
                tier=artifact.tier,
                tags=artifact.tags,
            )
            self._store.commit(partial, manifest)
            del self._made[quantization]
        made = self._store.lookup(artifact.family, file)
        if made is None:
            raise ModelFileError(f"{file} was removed by somebody while it was measured; tune again")
        self._files[quantization] = made.path
        return made

    def _tuning(self, of: StoredArtifact, variant: Variant, findings: Findings, *, instead: str = "") -> Tuning:
        assert self._machine is not None
        record, loss = findings.record(variant), findings.loss(variant)
        return Tuning(
            model=of.artifact.name,
            family=of.artifact.family,
            sha256=of.artifact.sha256,
            machine=self._machine.identity,
            cpu=read_cpu().model,
            llama_build=self._machine.llama_build,
            offload=self._machine.offload,
            tuned_at=datetime.now(UTC).isoformat(timespec="seconds"),
            threads=variant.threads,
            batch_tokens=variant.batch_tokens,
            micro_batch_tokens=variant.micro_batch_tokens,
            cache_type=variant.cache_type,
            streams=self._options.streams,
            prefill=round(record.figure("prefill").median, 1),
            decode_one=round(record.figure("decode_one").median, 1),
            decode_many=round(record.figure("decode_many").median, 1),
            gain=round(findings.gain(variant) or 1.0, 3),
            perplexity_change=round(loss.change, 4) if loss is not None else 0.0,
            instead=instead,
        )


def describe(variant: Variant) -> str:
    """A variant in a few words, for progress."""
    file = f"{variant.quantization}, " if variant.quantization else ""
    return (
        f"{file}{variant.threads} threads, batches {variant.batch_tokens}/{variant.micro_batch_tokens}, "
        f"KV {variant.cache_type}"
    )


def busy_share(seconds: float = 0.5) -> float:
    """How much of the machine others use at this moment, 0 to 1; takes `seconds`."""
    return float(psutil.cpu_percent(interval=seconds)) / 100


def _power_of_two(wanted: float, lowest: int, highest: int) -> int:
    size = lowest
    while size * 2 <= min(wanted, highest):
        size *= 2
    return size
