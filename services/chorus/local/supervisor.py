"""The supervisor of a local mesh: starts its processes, watches them, starts them again, and ends them in order.

It runs on the event loop of its process's main thread (see `lifeline`), which must be the only one that forks. What it
decides about restarts is `core.resilience.restarts`; what it says goes to `report`; what it knows is in the state file.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

from chorus.core.errors import UnavailableError
from chorus.core.identity import Role
from chorus.core.resilience.restarts import LeaveDown, ProcessPhase, RestartPolicy, Restarts, StartAgain
from chorus.core.resilience.silence import ProbePolicy
from chorus.local.events import Ended, Ready, Serving, Silent, Started, Stopped, Stopping, SupervisorEvent
from chorus.local.plan import MeshPlan, ProcessPlan
from chorus.local.probe import watch_health
from chorus.local.process import Child, log_tail
from chorus.local.state import MeshState, ProcessState, this_process
from chorus.transport.tls import TlsIdentity

# Beyond what running answers get to finish: a process has to notice, and to close what it has open.
_END_MARGIN_S = 5.0
_LAST_WORDS = 6

Report = Callable[[SupervisorEvent], None]
FirstAnswer = Callable[[], Awaitable[tuple[str, ...]]]


class _Unit:
    """One process with everything that is known of it."""

    def __init__(self, plan: ProcessPlan, policy: RestartPolicy) -> None:
        self.plan = plan
        self.restarts = Restarts(policy)
        self.child: Child | None = None
        self.starts = 0
        self.last_end = ""
        self.silent_s: float | None = None  # for how long, where it was killed for its silence
        self.settled = asyncio.Event()  # it has served, or was left down
        self.nudged = asyncio.Event()  # somebody wants it looked at now
        self.task: asyncio.Task[None] | None = None

    def describe_end(self, how: str) -> str:
        """`how` it ended, and why, where that was our doing."""
        if self.silent_s is None:
            return how
        return f"answered nothing for {self.silent_s:.0f} s, though it had not ended, and was killed"

    def state(self) -> ProcessState:
        return ProcessState(
            name=self.plan.name,
            role=self.plan.role.value,
            address=self.plan.address.authority,
            phase=self.restarts.phase.value,
            log=str(self.plan.log_file),
            config=str(self.plan.config_file),
            process=self.child.ref if self.child is not None else None,
            failures=self.restarts.failures,
            starts=self.starts,
            last_end=self.last_end,
        )


class Supervisor:
    """Supervises one mesh, once. `first_answer` asks the mesh something and returns the names of its models."""

    def __init__(
        self,
        plan: MeshPlan,
        *,
        identity: TlsIdentity | None,
        policy: RestartPolicy,
        probes: ProbePolicy,
        report: Report,
        first_answer: FirstAnswer,
    ) -> None:
        self._plan = plan
        self._probes = probes
        self._identity = identity
        self._report = report
        self._first_answer = first_answer
        self._units = [_Unit(process, policy) for process in plan.processes]
        self._stopping = asyncio.Event()
        self._defect: BaseException | None = None
        client = plan.client
        self._state = MeshState(
            supervisor=this_process(),
            phase="starting",
            supervised=policy.supervised,
            trust_domain=client.mesh.trust_domain,
            certs_dir=str(client.mesh.certs_dir),
            coordinator=str(client.client.coordinators[0]),
            identity=client.client.identity,
            insecure_loopback=client.mesh.insecure_loopback,
            processes=tuple(unit.state() for unit in self._units),
        )

    def stop(self) -> None:
        """Asks for an orderly end; asked twice, whatever still runs is killed."""
        if self._stopping.is_set():
            for unit in self._units:
                if unit.child is not None:
                    unit.child.kill()
        self._stopping.set()

    def start_what_is_down(self) -> None:
        """Starts every process that was left down, with all of its tries anew."""
        for unit in self._units:
            unit.nudged.set()

    async def run(self, *, handle_signals: bool = True) -> None:
        """Runs the mesh until it is asked to stop; nothing of it runs any more on return.

        Raises UnavailableError where the mesh could not be brought up, or the error of its first answer.
        """
        if handle_signals:
            self._handle_signals()
        for process in self._plan.processes:
            process.write_config()
        self._write()
        for unit in self._units:
            unit.task = self._create_task(self._tend(unit))
        coming_up = asyncio.create_task(self._come_up(), name="come up")
        stop = asyncio.create_task(self._stopping.wait(), name="stop")
        try:
            await asyncio.wait({coming_up, stop}, return_when=asyncio.FIRST_COMPLETED)
            if coming_up.done():
                coming_up.result()
                await stop
        finally:
            for task in (coming_up, stop):
                task.cancel()
            await asyncio.gather(coming_up, stop, return_exceptions=True)
            await self._shut_down()
        if self._defect is not None:
            raise self._defect

    # --- coming up ----------------------------------------------------------------------------------------------------

    async def _come_up(self) -> None:
        await asyncio.gather(*(unit.settled.wait() for unit in self._units))
        self._check_enough_is_up()
        models = await self._first_answer()
        self._state = replace(self._state, phase="ready", models=models)
        self._write()
        self._report(Ready(self._state))

    def _check_enough_is_up(self) -> None:
        down = [unit for unit in self._units if unit.restarts.phase is ProcessPhase.DOWN]
        runners_up = any(unit.plan.role is Role.RUNNER and unit not in down for unit in self._units)
        vital = [unit for unit in down if unit.plan.role is not Role.RUNNER or not runners_up]
        if vital:
            names = " and ".join(f"{unit.plan.name} ({unit.last_end})" for unit in vital)
            words = log_tail(vital[0].plan.log_file, 1)
            last = f": {words[0].strip()}" if words else ""
            raise UnavailableError(f"the mesh did not come up: {names} is down{last} (log: {vital[0].plan.log_file})")

    # --- one process --------------------------------------------------------------------------------------------------

    async def _tend(self, unit: _Unit) -> None:
        clock = asyncio.get_running_loop().time
        while not self._stopping.is_set():
            how = await self._live(unit)
            if self._stopping.is_set():
                break
            unit.last_end = how
            decision = unit.restarts.ended(clock())
            words = log_tail(unit.plan.log_file, _LAST_WORDS)
            self._update(unit)
            self._report(Ended(unit.plan.name, how, decision, str(unit.plan.log_file), tuple(words)))
            unit.nudged.clear()
            match decision:
                case StartAgain(at=at):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(at):
                            await unit.nudged.wait()
                case LeaveDown():
                    unit.settled.set()
                    await unit.nudged.wait()
        unit.restarts.stopped()
        unit.settled.set()
        self._update(unit)

    async def _live(self, unit: _Unit) -> str:
        """One life of a process, from its start to its end; returns how that came."""
        unit.restarts.started()
        try:
            unit.child = await Child.start(unit.plan)
        except OSError as error:
            return f"could not be started: {error.strerror or error}"
        unit.starts += 1
        self._update(unit)
        self._report(Started(unit.plan.name, unit.child.pid, again=unit.starts > 1))
        watch = self._create_task(self._watch_health(unit))
        unit.silent_s = None
        try:
            how = await unit.child.wait()
        finally:
            unit.child = None
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        return unit.describe_end(how)

    async def _watch_health(self, unit: _Unit) -> None:
        """Notes that it serves; kills it if it falls silent, unless it is being stopped: that has its own patience."""
        child = unit.child
        silent_s = await watch_health(unit.plan, self._identity, self._probes, lambda: self._serves(unit))
        if child is None or self._stopping.is_set():
            return
        unit.silent_s = silent_s
        self._report(Silent(unit.plan.name, child.pid, silent_s))
        child.kill()

    def _serves(self, unit: _Unit) -> None:
        unit.restarts.healthy(asyncio.get_running_loop().time())
        unit.settled.set()
        self._update(unit)
        self._report(Serving(unit.plan.name))

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        """First who takes requests, then who answers them, then who knows them: nobody misses what is gone before."""
        self._stopping.set()
        self._state = replace(self._state, phase="stopping")
        self._write()
        for role in (Role.COORDINATOR, Role.RUNNER, Role.REGISTRY):
            await asyncio.gather(*(self._end(unit) for unit in self._units if unit.plan.role is role))
        self._plan.options.home.state_file.unlink(missing_ok=True)

    async def _end(self, unit: _Unit) -> None:
        unit.nudged.set()
        while unit.task is not None and not unit.task.done():
            child = unit.child
            if child is None:  # between two lives: its task sees by itself that there is no next one
                await asyncio.wait({unit.task}, timeout=0.05)
                continue
            grace_s = unit.plan.drain_grace_s
            self._report(Stopping(unit.plan.name, grace_s))
            politely = await child.stop(grace_s + _END_MARGIN_S)
            await asyncio.wait({unit.task})
            self._report(Stopped(unit.plan.name, politely))

    def _create_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts a task that nobody waits for. Should it fail, which is a defect, the mesh ends and `run` raises it."""

        def done(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._defect = self._defect or error
                self.stop()

        task = asyncio.create_task(work)
        task.add_done_callback(done)
        return task

    # --- telling ------------------------------------------------------------------------------------------------------

    def _update(self, unit: _Unit) -> None:
        self._state = self._state.with_process(unit.state())
        self._write()

    def _write(self) -> None:
        self._state.write(self._plan.options.home.state_file)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGUSR1, self.start_what_is_down)
