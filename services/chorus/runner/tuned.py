"""What `chorus tune` found for this machine, as a runner makes use of it."""

from __future__ import annotations

from chorus.core.fleet.records import Artifact
from chorus.core.tuning.variant import machine_identity
from chorus.engine.llama import binding
from chorus.engine.llama.settings import Tuned, usable_threads
from chorus.hardware.cpu import read_cpu
from chorus.models import ModelStore, StoredArtifact
from chorus.models.tuning import Machine, Tuning, TuningFolder
from chorus.telemetry.logs import get_logger

_log = get_logger()


def this_machine(*, gpu_layers: int, llama_build: str = "", offloads: bool | None = None) -> Machine:
    """What tunings must have been measured on to be of use here.

    The facts about llama.cpp may come from a process that has it loaded already; else it is loaded here. Raises
    ConfigError where it can't be.
    """
    offloads = binding.supports_gpu_offload() if offloads is None else offloads
    return Machine(
        identity=machine_identity(read_cpu(), usable_threads()),
        llama_build=llama_build or binding.build(),
        offload=gpu_layers != 0 and offloads,
    )


class TunedModels:
    """The tunings of this machine. What isn't used is logged once, with why."""

    def __init__(self, machine: Machine, folder: TuningFolder | None = None) -> None:
        self._machine = machine
        self._folder = folder or TuningFolder()
        self._told: set[tuple[str, str]] = set()

    def tuning(self, artifact: Artifact) -> Tuning | None:
        """How an artifact runs best here, if that was measured."""
        found = self._folder.find(artifact.sha256, self._machine)
        told = (artifact.sha256, found.ignored)
        if found.ignored and told not in self._told:
            self._told.add(told)
            _log.info("tuning.ignored", model=artifact.name, why=found.ignored)
        return found.tuning

    def tuned(self, artifact: Artifact, *, configured_threads: int) -> Tuned:
        """The same as settings. What somebody configured (0 threads: nothing) was meant, and goes before it."""
        found = self.tuning(artifact)
        if found is None:
            return Tuned()
        return Tuned(
            threads=None if configured_threads else found.threads,
            batch_tokens=found.batch_tokens,
            micro_batch_tokens=found.micro_batch_tokens,
            cache_type=found.cache_type,
        )

    def preferred(self, store: ModelStore, stored: StoredArtifact) -> StoredArtifact:
        """The artifact that was made to run in place of `stored` here, while it is still there; else `stored`."""
        tuning = self.tuning(stored.artifact)
        if tuning is None or not tuning.instead:
            return stored
        for other in store.artifacts():
            if (other.artifact.sha256, other.artifact.family) == (tuning.instead, stored.artifact.family):
                return other
        return stored
