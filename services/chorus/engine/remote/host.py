"""One model at a server, as this runner keeps it: what was found of it, its slots, and its load under way."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

from chorus.core.errors import ChorusError
from chorus.core.fleet.records import ModelLoad, ModelState, ModelStatus
from chorus.core.generation import Phase, Progress
from chorus.engine.remote.dialect import RemoteModel
from chorus.engine.remote.slots import Run, Slots

ProgressCallback = Callable[[Progress], None]
_WEIGHT = 0.3


class Host:
    """Everything happens on the event loop."""

    def __init__(self, model: RemoteModel, max_queue: int) -> None:
        self.model = model
        self.state = model.status.state
        self.slots = Slots(model.status.slot_count, max_queue)
        self.loading: asyncio.Task[None] | None = None
        self.load_run: Run | None = None
        self.waiting_for_load: list[ProgressCallback] = []
        self.tokens_per_second = 0.0
        self._heard_at = -math.inf

    @property
    def status(self) -> ModelStatus:
        """The model as it stands now."""
        return replace(self.model.status, state=self.state, slot_count=self.slots.total)

    @property
    def load(self) -> ModelLoad:
        """What it has to do now."""
        return ModelLoad(
            model=self.model.status.artifact.name,
            slots_used=self.slots.used,
            slots_total=self.slots.total,
            queued=len(self.slots.room),
            tokens_per_second=self.tokens_per_second,
        )

    def update(self, model: RemoteModel) -> None:
        """Takes what was found now; a load under way here is known better here."""
        self.model = model
        self.slots.total = model.status.slot_count
        if self.loading is None:
            self.state = model.status.state

    def measured(self, tokens_per_second: float) -> None:
        """Takes the decode rate of one finished stream."""
        if tokens_per_second > 0:
            old = self.tokens_per_second or tokens_per_second
            self.tokens_per_second = old + _WEIGHT * (tokens_per_second - old)

    def tell(self, done: bool) -> None:
        """Tells who waits for the load that it has begun, or is done."""
        size = max(1, self.model.status.artifact.size_bytes)
        for callback in list(self.waiting_for_load):
            callback(Progress(Phase.LOADING, size if done else 0, size))

    def abort(self, error: ChorusError) -> None:
        """Ends what runs, waits and loads with `error`."""
        self.slots.abort_all(error)
        if self.load_run is not None:
            self.load_run.abort(error)

    def heard(self) -> None:
        """The server has just said something to one of its requests."""
        self._heard_at = asyncio.get_running_loop().time()

    def heard_since(self, time: float) -> bool:
        """Whether the server has said anything to a request since then (by the event loop's clock)."""
        return self._heard_at >= time

    def is_busy(self) -> bool:
        """Whether requests run or wait here, or it is being loaded."""
        return bool(self.slots.runs) or self.loading is not None

    def is_loaded(self) -> bool:
        """Whether it is in the server's memory."""
        return self.state is ModelState.LOADED
