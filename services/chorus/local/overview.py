"""The state of a mesh, as its coordinator and this machine's supervisor see it, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

from chorus.client import MeshNodes
from chorus.core.fleet.records import ModelState, RunnerState
from chorus.core.identity import Role
from chorus.core.resilience.restarts import ProcessPhase
from chorus.local.state import MeshState

_DOWN = {ProcessPhase.DOWN: "is left down", ProcessPhase.WAITING: "is down, and will be started again"}

# A runner that was heard of less long ago than this runs, whoever started it.
_SILENT_S = 1.0


@dataclass(frozen=True, slots=True)
class Overview:
    """What the coordinator tells of every node, and what runs on this machine (None: nothing that `up` started)."""

    seen: MeshNodes
    local: MeshState | None

    def problems(self) -> list[str]:
        """What keeps the mesh from being all that it should be, worst first, for people; empty where nothing does."""
        found: list[str] = []
        runners = [leased for node in self.seen.nodes for leased in node.runners]
        if not runners:
            found.append("no runner is in the directory")
        elif not any(leased.record.state is RunnerState.READY for leased in runners):
            found.append("no runner is ready")
        found += [
            f"registry {registry.address} cannot be reached: {registry.problem or 'no connection'}"
            for registry in self.seen.registries
            if not registry.connected
        ]
        for leased in runners:
            name = leased.record.runner.runner_id
            found += [
                f"{name} could not load {model.artifact.name}: {model.error}"
                for model in leased.record.runner.models
                if model.state is ModelState.FAILED
            ]
        return found + self._local_problems()

    def restarts(self) -> list[str]:
        """Which processes of this machine serve again after an end that nobody asked for, and how that came."""
        if self.local is None:
            return []
        return [
            f"{process.name} on this machine was started {process.starts} times; before the last it {process.last_end}"
            for process in self.local.processes
            if process.starts > 1 and process.last_end and process.phase == ProcessPhase.HEALTHY
        ]

    def _local_problems(self) -> list[str]:
        if self.local is None:
            return []
        if not self.local.alive:
            return ["the supervisor of the mesh on this machine has gone; `chorus up` starts it again"]
        heard = {registry.address.rpartition("@")[2] for registry in self.seen.registries if registry.connected}
        ours = any(process.role == Role.REGISTRY and process.address in heard for process in self.local.processes)
        ages = {
            leased.record.runner.runner_id: leased.lease_age_s for node in self.seen.nodes for leased in node.runners
        }
        found = []
        for process in self.local.processes:
            who, is_runner = f"{process.name} on this machine", process.role == Role.RUNNER
            answers = ours and (not is_runner or ages.get(process.name, _SILENT_S) < _SILENT_S)
            if process.phase == ProcessPhase.DOWN and answers:
                continue  # started again by hand
            if process.phase in _DOWN:
                found.append(f"{who} {_DOWN[ProcessPhase(process.phase)]}: it {process.last_end}")
            elif ours and is_runner and process.phase == ProcessPhase.HEALTHY and process.name not in ages:
                found.append(f"{who} runs, but its registry does not hear from it; its log: {process.log}")
        return found
