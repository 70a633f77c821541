"""Who of many is asked at once: no more than the mesh has slots for, and few models at a time.

A model that isn't in memory has to be loaded, on a small machine in place of another one. So models that are there come
first, and all members of a model come together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chorus.core.ensemble.steps import Ask


@dataclass(frozen=True, slots=True)
class Room:
    """What the mesh has: slots by model (absent: no bound), models in memory, and how many models may be at work."""

    slots: Mapping[str, int] = field(default_factory=dict)
    loaded: frozenset[str] = frozenset()
    models_at_once: int = 0  # 0: any number


class Waves:
    """Those of a round that still have to be asked."""

    def __init__(self, asks: Sequence[Ask], room: Room) -> None:
        order = {model: place for place, model in reversed(list(enumerate(ask.request.model for ask in asks)))}
        self._room = room
        self._waiting = sorted(asks, key=lambda ask: (ask.request.model not in room.loaded, order[ask.request.model]))
        self._running: Counter[str] = Counter()

    @property
    def waiting(self) -> tuple[Ask, ...]:
        """Those who were not asked yet."""
        return tuple(self._waiting)

    def next(self) -> list[Ask]:
        """Whom to ask now; they count as running until they have `ended`."""
        going = [ask for ask in self._waiting if self._take(ask.request.model)]
        for ask in going:
            self._waiting.remove(ask)
        return going

    def ended(self, ask: Ask) -> None:
        """One that was asked has ended."""
        self._running[ask.request.model] -= 1
        if not self._running[ask.request.model]:
            del self._running[ask.request.model]

    def _take(self, model: str) -> bool:
        running, room = self._running, self._room
        if running[model] >= max(1, room.slots.get(model, 1 << 30)):
            return False
        at_once = room.models_at_once
        if at_once and not running[model] and len(+running) >= at_once:
            return False
        running[model] += 1
        return True
