"""When models are asked for, so that one can be loaded before it is: at a time of day or week, or after another model.

Each is counted as how often it happened of how often it could have, both fading, with one time more in which it did
not: what was seen once proves nothing, twice in a row is a pattern. Times of day and week are cut into slots of a
quarter of an hour, in universal time, and what comes near a slot's edge counts for its neighbour as well.

A coordinator knows what it was asked itself; `remembered` and `recall` carry that over a restart. Times are seconds
since the Unix epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

DAY_S = 86_400.0
WEEK_S = 7 * DAY_S
SLOT_S = 900.0
# Of what happened a day, a week, or one use of the model before, so much still counts now.
FADING = 0.8
# One use of a model: requests with shorter pauses are the same one. What is asked for so soon after it began follows.
PAUSE_S = 120.0
# Models and followers remembered, the latest ones: callers may make up names.
MAX_MODELS = 128
MAX_FOLLOWERS = 16
_CYCLES = (DAY_S, WEEK_S)
# What a slot's hits have faded to when they are not worth remembering over a restart.
_FAINT = 0.05


@dataclass(frozen=True, slots=True)
class ModelPattern:
    """What was seen of one model, to be remembered: its slots as (cycle, slot, last cycle's number, hits by then)."""

    model: str
    first_at: float
    last_at: float
    began_at: float
    uses: float
    slots: tuple[tuple[float, int, int, float], ...]
    followers: tuple[tuple[str, float], ...]


@dataclass(slots=True)
class _Model:
    """What is remembered of one."""

    first_at: float
    last_at: float
    began_at: float  # the use that goes on, or was last
    slots: dict[tuple[float, int], tuple[int, float]] = field(default_factory=dict)  # last cycle, hits by then
    uses: float = 0.0
    followers: OrderedDict[str, float] = field(default_factory=OrderedDict)
    followed: set[str] = field(default_factory=set)  # in this use


class Patterns:
    """What one coordinator has seen of its models."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, _Model] = OrderedDict()

    def asked(self, model: str, now: float) -> None:
        """A request for a model has come. A clock that was put back makes no difference but to what it says."""
        seen = self._models.get(model)
        begins = seen is None or now - seen.last_at > PAUSE_S
        if seen is None:
            seen = self._models[model] = _Model(now, now, now)
        self._models.move_to_end(model)
        while len(self._models) > MAX_MODELS:
            self._models.popitem(last=False)
        seen.last_at = max(now, seen.last_at)
        self._count_slots(seen, now)
        if begins:
            self._begin(seen, now)
        self._follow(model, now)

    def likely(self, now: float, load_s: Mapping[str, float], least: float) -> dict[str, float]:
        """Those of the models that will probably (`least`, 0 to 1) be asked for within the seconds that each takes to
        load, and how probably."""
        found: dict[str, float] = {}
        for model, seconds in load_s.items():
            probability = self._after_others(model, now)
            seen = self._models.get(model)
            if seen is not None:
                probability = max(probability, self._at_times(seen, now), self._at_times(seen, now + seconds))
            if probability >= least:
                found[model] = probability
        return found

    def remembered(self, now: float) -> tuple[ModelPattern, ...]:
        """All that `recall` has to be given after a restart, the latest last; what has faded is left out."""
        return tuple(
            ModelPattern(
                name,
                seen.first_at,
                seen.last_at,
                seen.began_at,
                seen.uses,
                tuple(
                    (cycle, slot, last, hits)
                    for (cycle, slot), (last, hits) in seen.slots.items()
                    if hits * FADING ** max(0, int(now // cycle) - last) >= _FAINT
                ),
                tuple(seen.followers.items()),
            )
            for name, seen in self._models.items()
        )

    def recall(self, patterns: Iterable[ModelPattern]) -> None:
        """What was remembered before a restart, when nothing has been asked for yet."""
        for told in tuple(patterns)[-MAX_MODELS:]:
            slots = {(cycle, slot): (last, hits) for cycle, slot, last, hits in told.slots}
            followers = OrderedDict(told.followers[-MAX_FOLLOWERS:])
            # Of what followed the use that went on then, it is not known what had come already.
            self._models[told.model] = _Model(
                told.first_at, told.last_at, told.began_at, slots, told.uses, followers, set(followers)
            )

    def _after_others(self, model: str, now: float) -> float:
        """How probably it is asked for since another one just was."""
        best = 0.0
        for before in self._models.values():
            if 0 <= now - before.began_at <= PAUSE_S and model not in before.followed:
                # The use that goes on, after which it has not been asked for yet, is the one time more.
                best = max(best, before.followers.get(model, 0.0) / before.uses)
        return best

    def _begin(self, seen: _Model, now: float) -> None:
        """Another use of a model begins."""
        seen.began_at = now
        seen.uses = FADING * seen.uses + 1.0
        seen.followed.clear()
        for follower in seen.followers:
            seen.followers[follower] *= FADING

    def _follow(self, model: str, now: float) -> None:
        """Notes after which models this one was asked for."""
        for name, before in self._models.items():
            if name != model and 0 <= now - before.began_at <= PAUSE_S and model not in before.followed:
                before.followed.add(model)
                before.followers[model] = before.followers.get(model, 0.0) + 1.0
                before.followers.move_to_end(model)
                while len(before.followers) > MAX_FOLLOWERS:
                    before.followers.popitem(last=False)

    def _count_slots(self, seen: _Model, now: float) -> None:
        for cycle in _CYCLES:
            for at in (now, now + _to_edge(now)):
                number, slot = int(at // cycle), int(at % cycle // SLOT_S)
                last, hits = seen.slots.get((cycle, slot), (number, 0.0))
                if last != number or not hits:
                    seen.slots[cycle, slot] = (number, hits * FADING ** max(0, number - last) + 1.0)

    def _at_times(self, seen: _Model, at: float) -> float:
        """How probably it is asked for in the slot of that time, by the cycle that tells more."""
        best = 0.0
        for cycle in _CYCLES:
            number, slot = int(at // cycle), int(at % cycle // SLOT_S)
            if (cycle, slot) not in seen.slots:
                continue
            last, hits = seen.slots[cycle, slot]
            before = number - int(seen.first_at // cycle)  # cycles that are over
            if last >= number or before <= 0:
                continue  # it has been asked for already
            chances = (1.0 - FADING**before) / (1.0 - FADING)
            best = max(best, hits * FADING ** (number - 1 - last) / (chances + 1.0))
        return best


def _to_edge(at: float) -> float:
    """What takes a time to the slot whose edge is nearer."""
    return SLOT_S if at % SLOT_S >= SLOT_S / 2 else -SLOT_S
