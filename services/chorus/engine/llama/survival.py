"""What becomes of a model whose owner thread dies, and of a process whose owner thread never comes back.

A thread that died has freed what it had, so its model is loaded again, a few times, each after a longer while. A thread
that hangs inside llama.cpp can be neither ended nor joined: what waits for it is ended, and the process has to go. Both
on the event loop; the decisions are `core.resilience`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from chorus.core.errors import ChorusError, EngineError
from chorus.core.resilience.restarts import RestartPolicy, Restarts, StartAgain
from chorus.core.resilience.stuck import Patience, Stuck, StuckWatch
from chorus.engine.llama.pulse import Pulse
from chorus.telemetry.logs import get_logger

_log = get_logger()

LOOK_INTERVAL_S = 1.0
RELOADS = 3
# One that lived for so long has proved itself: what ended it later is a new trouble.
_POLICY = RestartPolicy(first_backoff_s=0.5, backoff_factor=4.0, healthy_after_s=60.0, failures_allowed=RELOADS + 1)


class Mortal(Protocol):
    """What is watched of a model: `engine.llama.host.Host`."""

    name: str

    @property
    def pulse(self) -> Pulse | None:
        """Of its owner thread, if it has one that lives."""
        ...

    @property
    def is_failed(self) -> bool:
        """Whether it is down because of a failure."""
        ...

    def abandon(self, error: ChorusError) -> None:
        """Its owner thread hangs: ends what waits for it with `error`, and leaves the thread where it is."""
        ...

    async def revive(self) -> None:
        """Loads it anew. Raises what a load raises."""
        ...


class Waiting:
    """What callers wait for from one owner thread: the ways to end each of them with an error. On the event loop."""

    def __init__(self) -> None:
        self._ends: dict[object, Callable[[ChorusError], None]] = {}

    def add(self, key: object, end: Callable[[ChorusError], None]) -> None:
        """Somebody waits; `key` stands for him."""
        self._ends[key] = end

    def discard(self, key: object) -> None:
        """He waits no more."""
        self._ends.pop(key, None)

    def end_all(self, error: ChorusError) -> None:
        """Ends every wait."""
        ends, self._ends = self._ends, {}
        for end in ends.values():
            end(error)


class Survival:
    """Watches the models of one engine. `broken` gets its result once the process has to be started again: why."""

    def __init__(
        self, models: Callable[[], Iterable[Mortal]], patience: Patience, *, policy: RestartPolicy = _POLICY
    ) -> None:
        """`models` gives those that there are now. Made on the event loop that it is used on."""
        self._models = models
        self._patience = patience
        self._policy = policy
        self._watches: dict[Pulse, StuckWatch] = {}
        self._restarts: dict[str, Restarts] = {}
        self._reviving: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self.broken: asyncio.Future[ChorusError] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        """Watches from now on."""
        self._watching = asyncio.create_task(self._watch(), name="watch of the engine's threads")

    async def stop(self) -> None:
        """Watches no more, and revives nobody."""
        tasks = self._reviving | ({self._watching} if self._watching is not None else set())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- one that hangs -----------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            self.look(time.monotonic())
            await asyncio.sleep(LOOK_INTERVAL_S)

    def look(self, now: float) -> None:
        """Looks at every owner thread once; `now` is on the clock of their pulses."""
        living: dict[Pulse, Mortal] = {model.pulse: model for model in self._models() if model.pulse is not None}
        self._watches = {pulse: self._watches.get(pulse) or StuckWatch(self._patience) for pulse in living}
        for pulse, watch in self._watches.items():
            stuck = watch.look(pulse.step, now)
            if stuck is not None:
                self._give_up(living[pulse], stuck)

    def _give_up(self, model: Mortal, stuck: Stuck) -> None:
        _log.error(
            "engine.hangs",
            model=model.name,
            tokens=stuck.tokens,
            seconds=round(stuck.seconds, 1),
            allowed_s=round(stuck.allowed_s, 1),
        )
        error = EngineError(
            f"the engine of {model.name} hangs: a step of {stuck.tokens} tokens takes {stuck.seconds:.0f} s already; "
            "its process ends, and its supervisor starts it again"
        )
        model.abandon(error)
        self._break(error)

    # --- one that died ------------------------------------------------------------------------------------------------

    def died(self, model: Mortal, lived_s: float) -> None:
        """A model's owner thread ended by itself after so many seconds. It is loaded again, or given up."""
        now = time.monotonic()
        restarts = self._restarts.setdefault(model.name, Restarts(self._policy))
        if not restarts.running:  # its first time, or somebody loaded it meanwhile
            restarts.started()
        restarts.healthy(now - lived_s)
        self._ended(model, restarts, now)

    def _ended(self, model: Mortal, restarts: Restarts, now: float) -> None:
        decision = restarts.ended(now)
        if isinstance(decision, StartAgain):
            _log.warning("engine.reload", model=model.name, failures=decision.failures, after_s=decision.at - now)
            task = asyncio.create_task(self._revive(model, restarts, decision.at - now), name=f"reload {model.name}")
            self._reviving.add(task)
            task.add_done_callback(self._reviving.discard)
            return
        others = [other.name for other in self._models() if other is not model and other.pulse is not None]
        _log.error("engine.given_up", model=model.name, failures=decision.failures, others_serve=others)
        if not others:  # a new process may do better; while others are served here, theirs is worth more
            self._break(
                EngineError(f"the engine of {model.name} died {decision.failures} times in a row; see the log for why")
            )

    async def _revive(self, model: Mortal, restarts: Restarts, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if not model.is_failed or restarts.running:  # somebody was faster, or has unloaded it
            return
        restarts.started()
        try:
            await model.revive()
        except ChorusError as error:
            _log.error("engine.reload_failed", model=model.name, reason=error.reason, why=error.message)
            self._ended(model, restarts, time.monotonic())

    def _break(self, error: ChorusError) -> None:
        if not self.broken.done():
            self.broken.set_result(error)


def failing_future(future: asyncio.Future[Any]) -> Callable[[ChorusError], None]:
    """The way to end somebody who waits for `future`."""

    def end(error: ChorusError) -> None:
        if not future.done():
            future.set_exception(error)

    return end
