"""The state of a mesh, as its coordinator and this machine's supervisor see it, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

from chorus.client import MeshNodes
from chorus.core.fleet.records import ModelState, RunnerState
from chorus.core.resilience.restarts import ProcessPhase
from chorus.local.state import MeshState

_DOWN = {ProcessPhase.DOWN: "is left down", ProcessPhase.WAITING: "is down, and will be started again"}


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

    def _local_problems(self) -> list[str]:
        if self.local is None:
            return []
        if not self.local.alive:
            return ["the supervisor of the mesh on this machine has gone; `chorus up` starts it again"]
        return [
            f"{process.name} on this machine {_DOWN[ProcessPhase(process.phase)]}: it {process.last_end}"
            for process in self.local.processes
            if process.phase in _DOWN
        ]
