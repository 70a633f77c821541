"""What a runner says of itself, to all of its registries alike.

An incarnation is the wall clock's milliseconds at the start, so that it is greater after a restart without anything
being kept on disk. Where a clock was put back in between, the registry refuses the new process for as long as the lease
of the old one lasts; it ends, its supervisor starts it again, and by then the lease has lapsed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from chorus.core.fleet.records import Load, Node, Runner, RunnerRecord, RunnerState
from chorus.core.identity import Role, SpiffeId
from chorus.engine.base import Engine
from chorus.hardware import HardwareLoad


class Presence:
    """A runner's state, models and load as of now. Everything that registries are to hear of wakes who waits for it.

    `runner` is what never changes; its incarnation, engine and models are filled in. `wall_ms` is the wall clock in
    milliseconds.
    """

    def __init__(self, runner: Runner, node: Node, engine: Engine, *, wall_ms: Callable[[], int]) -> None:
        self._wall_ms = wall_ms
        self._runner = replace(runner, incarnation=max(1, wall_ms()))
        self._node = node
        self._engine = engine
        self._state = RunnerState.STARTING
        self._sequence = 0
        self._registered_version = 0
        self._changed = asyncio.Event()  # replaced at every change: whoever has the old one is woken
        self._requests: Counter[str] = Counter()  # by coordinator
        self._hardware = HardwareLoad(0.0, node.memory_total_bytes, node.memory_available_bytes, node.gpus)

    @property
    def runner_id(self) -> str:
        """The runner's id."""
        return self._runner.runner_id

    @property
    def incarnation(self) -> int:
        """The incarnation now."""
        return self._runner.incarnation

    @property
    def node_id(self) -> str:
        """The machine's id."""
        return self._node.node_id

    @property
    def state(self) -> RunnerState:
        """The state now."""
        return self._state

    @property
    def record_version(self) -> int:
        """Rises whenever a registration says more than a heartbeat could: with the models and the incarnation."""
        return self._registered_version

    @property
    def changed(self) -> asyncio.Event:
        """Set once something happens that registries should hear of at once; another event each time."""
        return self._changed

    # --- what happens -----------------------------------------------------------------------------------------------

    def set_address(self, address: str) -> None:
        """Takes the `host:port` at which coordinators dial the runner; before anybody is told anything."""
        self._runner = replace(self._runner, address=address)

    def set_state(self, state: RunnerState) -> None:
        """Takes a new state."""
        if state is not self._state:
            self._state = state
            self._wake()

    def models_changed(self) -> None:
        """The engine's models are not what they were."""
        self._registered_version += 1
        self._wake()

    def set_hardware(self, load: HardwareLoad) -> None:
        """Takes a new measurement of the machine, to go out with the next heartbeat."""
        self._hardware = load

    def reincarnate(self) -> int:
        """Begins and returns a new incarnation: whatever was known of this runner no longer holds, as after a sleep."""
        self._runner = replace(self._runner, incarnation=max(self._wall_ms(), self._runner.incarnation + 1))
        self._registered_version += 1
        self._wake()
        return self._runner.incarnation

    @contextmanager
    def serving(self, sender: SpiffeId | None) -> Iterator[None]:
        """Counts a request for the length of the block, where a coordinator sent it, or the client with its ticket."""
        if sender is None or sender.role is not Role.COORDINATOR:
            yield
            return
        name = str(sender)
        self._requests[name] += 1
        try:
            yield
        finally:
            self._requests[name] -= 1
            if not self._requests[name]:
                del self._requests[name]

    # --- what is told -----------------------------------------------------------------------------------------------

    def next_sequence(self) -> int:
        """A number greater than all before, for the next message to any registry."""
        self._sequence += 1
        return self._sequence

    def runner(self) -> Runner:
        """The runner with its models as they stand now."""
        return replace(self._runner, engines=(self._engine.info,), models=self._engine.models())

    def node(self) -> Node:
        """The machine as last measured."""
        measured = self._hardware
        return replace(self._node, memory_available_bytes=measured.memory_available_bytes, gpus=measured.gpus)

    def load(self) -> Load:
        """The load of the models now, and of the machine as last measured."""
        measured = self._hardware
        return Load(
            self._engine.load_report(),
            measured.memory_available_bytes,
            measured.cpu_utilization,
            measured.gpus,
            dict(self._requests),
        )

    def record(self) -> RunnerRecord:
        """Everything, for a registration."""
        return RunnerRecord(self.runner(), self.node(), self._state, self.load(), self.next_sequence())

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
