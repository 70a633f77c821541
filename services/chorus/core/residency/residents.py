"""Which models are in memory: who is loaded next, who makes room for it and when, who waits.

Pure: the engine says who asked, who is done and what was loaded, and carries out one decision after the other.

Making room. A model that doesn't fit has others evicted: the least recently used ones first, idle ones before ones in
use, never a pinned one, and no more than needed. One in use is not interrupted: it takes nobody new and is waited for.

Swaps. Where two models that don't fit together are asked for in turn, each request could cost a load. So a model is
held for as long as a load takes (at most `longest_hold_s`) after its last use: who asks for it meanwhile needs no load.
This is the rule for renting skis (Karlin et al., Competitive snoopy caching, 1988): at most twice as dear as knowing
what comes. And it is bounded: that long after somebody began to wait, the model in the way takes nobody new, ends what
it has and goes; then everybody who came for the other is served together. Models that are waited for have their turn by
who has waited longest. One that fits beside all those is loaded at once.

Contexts. A model is loaded with one context, for which its memory is planned. Who chooses none takes whatever is there;
of those who choose one the first has it, and who chooses another one is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from chorus.core.errors import InvalidRequestError
from chorus.core.residency.allocation import Allocation, Wish, allocate
from chorus.core.residency.devices import HOST, Machine
from chorus.core.residency.shortage import Held, Shortage


@dataclass(frozen=True, slots=True)
class Rules:
    """How memory is shared out over time. Seconds; 0 for `max_loaded` and `keep_alive_s` is no limit."""

    max_loaded: int = 0
    keep_alive_s: float = 0.0
    longest_hold_s: float = 5.0


@dataclass(slots=True, eq=False)
class Ask:
    """Somebody who waits for a model since `at`: with the context of this `wish` where it was `chosen`, else with any.

    Another wish, for the same context, may take the place of this one while it waits.
    """

    wish: Wish
    at: float
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """Load this model, with this context, as large as what was planned for; then say `loaded` or `gone`."""

    model: str
    allocation: Allocation
    context_length: int


class Why(StrEnum):
    """Why a model is evicted."""

    ROOM = "another model needs its memory"
    IDLE = "nobody has used it for long"


@dataclass(frozen=True, slots=True)
class Evict:
    """Unload this model, which nobody uses; then say `gone`."""

    model: str
    why: Why


@dataclass(frozen=True, slots=True)
class Refuse:
    """These are to be refused; they wait no more. Who else waits for the model did not choose what does not fit."""

    shortage: Shortage
    asks: tuple[Ask, ...]


@dataclass(frozen=True, slots=True)
class Admit:
    """Everybody who waits for this loaded model uses it from now on."""

    model: str


@dataclass(frozen=True, slots=True)
class Nothing:
    """Nothing to do until something happens, or until that time."""

    until: float = math.inf


Decision = Load | Evict | Refuse | Admit | Nothing


_NOWHERE = Allocation(0)


class _State(StrEnum):
    ABSENT = "absent"
    LOADING = "loading"
    LOADED = "loaded"
    LEAVING = "leaving"


@dataclass(slots=True, eq=False)
class _Model:
    given: Wish  # what it is loaded for, or was last
    state: _State = _State.ABSENT
    allocation: Allocation = _NOWHERE
    users: int = 0
    asked: list[Ask] = field(default_factory=list)  # those who wait, in the order in which they came
    began: float = 0.0
    loaded_at: float = 0.0
    used_at: float = 0.0
    load_s: float = 0.0  # what the last load took

    @property
    def name(self) -> str:
        return self.given.name

    @property
    def chosen(self) -> Ask | None:
        """The one who waits whose context it is to have."""
        return next((ask for ask in self.asked if ask.chosen), None)

    @property
    def wish(self) -> Wish:
        """What it is loaded for, or would be."""
        if self.state is not _State.ABSENT or not self.asked:
            return self.given
        return (self.chosen or self.asked[0]).wish

    @property
    def idle(self) -> bool:
        return not self.users and not self.asked


@dataclass(frozen=True, slots=True)
class _Plan:
    allocation: Allocation
    victims: tuple[_Model, ...]
    whole: bool


class Residency:
    """See the module's text. `now` is seconds of one steady clock throughout."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._models: dict[str, _Model] = {}
        self._closed: set[str] = set()  # in memory, but in the way of somebody who has waited long enough

    # --- what happens -----------------------------------------------------------------------------------------------

    def ask(self, wish: Wish, now: float, *, chosen: bool = False) -> Ask | None:
        """A request comes for a model; None: it uses it already, else it waits to be admitted.

        Raises `InvalidRequestError` where its context was `chosen` and the model has, or is to have, another one.
        """
        model = self._models.setdefault(wish.name, _Model(wish))
        if chosen:
            self._check_context(model, wish.context_length)
        if model.state is _State.LOADED and model.name not in self._closed:
            model.users += 1
            model.used_at = now
            return None
        ask = Ask(wish, now, chosen)
        model.asked.append(ask)
        return ask

    def withdraw(self, ask: Ask) -> None:
        """Somebody who asked waits no more."""
        self._models[ask.wish.name].asked.remove(ask)

    def leave(self, name: str, now: float) -> None:
        """Somebody who used the model is done."""
        model = self._models[name]
        if model.users < 1:
            raise ValueError(f"nobody uses {name}")
        model.users -= 1
        model.used_at = now

    def loaded(self, name: str, now: float) -> bool:
        """The model is in memory; everybody who waited for it uses it from now on. False: it is on its way out."""
        model = self._models[name]
        model.loaded_at = model.used_at = now
        model.load_s = now - model.began
        if model.state is not _State.LOADING:
            return False
        model.state = _State.LOADED
        self._admit(model)
        return True

    def leaving(self, name: str) -> None:
        """The model's owner has it unloaded, whoever uses it."""
        if name in self._models:
            self._models[name].state = _State.LEAVING

    def gone(self, name: str) -> None:
        """The model is no longer in memory: it was unloaded, could not be loaded, or failed. Who waits, waits on."""
        model = self._models.get(name)
        if model is not None:
            model.state, model.allocation = _State.ABSENT, _NOWHERE
            self._closed.discard(name)

    # --- what is ------------------------------------------------------------------------------------------------------

    @property
    def anybody_waits(self) -> bool:
        """Whether a request waits for a model."""
        return any(model.asked for model in self._models.values())

    def is_loaded(self, name: str) -> bool:
        """Whether it is in memory, and not about to be unloaded."""
        model = self._models.get(name)
        return model is not None and model.state is _State.LOADED

    def place_in_queue(self, name: str) -> int:
        """How many models, those being loaded included, are waited for longer than this one."""
        order = [model.name for model in self._models.values() if model.state is _State.LOADING]
        order += [model.name for model in self._waited_for()]
        return order.index(name) if name in order else len(order)

    def allocation(self, name: str) -> Allocation | None:
        """Where a model is that is in memory, or on its way there or out."""
        model = self._models.get(name)
        return model.allocation if model is not None and model.state is not _State.ABSENT else None

    # --- what is to be done -------------------------------------------------------------------------------------------

    def decide(self, now: float, machine: Machine) -> Decision:
        """The next thing to do, with memory as it is now; asked again after each, and whenever something happened."""
        closed, self._closed = self._closed, set()
        if any(model.state in (_State.LOADING, _State.LEAVING) for model in self._models.values()):
            self._closed = {name for name in closed if self.is_loaded(name)}
            return Nothing()
        wake = math.inf
        earlier: list[tuple[_Model, _Plan]] = []
        for model in self._waited_for():
            plan = self._plan(model.wish, machine)
            if plan is None:
                return self._refuse(model, machine)
            if not plan.victims:
                if self._leaves_room(plan.allocation, earlier, machine):
                    return self._load(model, plan.allocation, now)
            elif not earlier:
                ready, wake = self._make_way(model, plan.victims, now)
                if ready:
                    return self._evict(plan.victims[0], Why.ROOM)
            earlier.append((model, plan))
        for model in self._models.values():
            if model.state is _State.LOADED and model.asked and model.name not in self._closed:
                self._admit(model)
                return Admit(model.name)
        for model in self._evictable():
            if self.rules.keep_alive_s and model.idle:
                lapses = model.used_at + self.rules.keep_alive_s
                if lapses <= now:
                    return self._evict(model, Why.IDLE)
                wake = min(wake, lapses)
        return Nothing(wake)

    def validate(self, machine: Machine) -> None:
        """Raises `AssertionError` where something can't be; for tests."""
        held = [model for model in self._models.values() if model.state is not _State.ABSENT]
        for device in machine.devices:
            assert sum(self._held(model, device.name, machine) for model in held) <= device.limit_bytes
        assert not self.rules.max_loaded or len(held) <= self.rules.max_loaded
        assert self._closed <= {model.name for model in held}
        for name, model in self._models.items():
            assert name == model.name
            assert model.asked == sorted(model.asked, key=lambda ask: ask.at)
            contexts = {ask.wish.context_length for ask in model.asked if ask.chosen}
            if model.state in (_State.LOADING, _State.LOADED):
                assert contexts <= {model.given.context_length}
            assert len(contexts) <= 1
            assert model.users >= 0
            assert model.state is not _State.ABSENT or model.allocation == _NOWHERE
            if model.state is _State.LOADED and model.asked:
                assert name in self._closed or any(m.state in (_State.LOADING, _State.LEAVING) for m in held)

    # --- inside -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _check_context(model: _Model, context_length: int) -> None:
        if model.state is _State.LOADED:
            there, how = model.given.context_length, "is loaded"
        elif model.state is _State.LOADING:
            there, how = model.given.context_length, "is being loaded"
        elif model.chosen is not None:
            there, how = model.chosen.wish.context_length, "is about to be loaded"
        else:
            return
        if context_length != there:
            raise InvalidRequestError("context_length", f"{model.name} {how} with {there}; unload it first")

    def _waited_for(self) -> list[_Model]:
        absent = [model for model in self._models.values() if model.state is _State.ABSENT and model.asked]
        return sorted(absent, key=lambda model: model.asked[0].at)

    def _evictable(self) -> list[_Model]:
        """Idle ones first, the least recently used of each kind first."""
        loaded = [model for model in self._models.values() if model.state is _State.LOADED and not model.wish.pinned]
        return sorted(loaded, key=lambda model: (not model.idle, model.used_at))

    def _plan(self, wish: Wish, machine: Machine) -> _Plan | None:
        """Where it goes and who makes room; None where it fits nowhere, whoever goes."""
        order = self._evictable()
        idle = [model for model in order if model.idle]
        # Being whole on graphics devices is worth the eviction of idle models, but not waiting for busy ones.
        for pool, whole in ((idle, True), (order, False)) if wish.devices(machine) else ((order, False),):
            for count in range(len(pool) + 1):
                if self._fits(wish, machine, pool[:count], whole) is not None:
                    return self._fewest(wish, machine, pool[:count], whole)
        return None

    def _fewest(self, wish: Wish, machine: Machine, victims: list[_Model], whole: bool) -> _Plan:
        for model in reversed(victims):
            others = [other for other in victims if other is not model]
            if self._fits(wish, machine, others, whole) is not None:
                victims = others
        allocation = self._fits(wish, machine, victims, whole)
        assert allocation is not None
        return _Plan(allocation, tuple(victims), whole)

    def _fits(
        self, wish: Wish, machine: Machine, victims: Sequence[_Model], whole: bool, also: Iterable[Allocation] = ()
    ) -> Allocation | None:
        staying = [m for m in self._models.values() if m.state is not _State.ABSENT and m not in victims]
        also = list(also)
        if self.rules.max_loaded and len(staying) + len(also) >= self.rules.max_loaded:
            return None
        return allocate(wish, machine, self._rooms(machine, staying, victims, also), whole=whole)

    def _rooms(
        self, machine: Machine, staying: Iterable[_Model], victims: Iterable[_Model], also: Iterable[Allocation]
    ) -> dict[str, int]:
        rooms = {}
        for device in machine.devices:
            coming = sum(_bytes_on(allocation, device.name, machine) for allocation in also)
            held = sum(self._held(model, device.name, machine) for model in staying) + coming
            freed = sum(self._held(model, device.name, machine) for model in victims)
            rooms[device.name] = device.room(held, freed - coming)
        return rooms

    @staticmethod
    def _held(model: _Model, device: str, machine: Machine) -> int:
        return _bytes_on(model.allocation, device, machine)

    def _leaves_room(self, allocation: Allocation, earlier: Sequence[tuple[_Model, _Plan]], machine: Machine) -> bool:
        """Whether each of those who came earlier could still have its turn with the same models evicted."""
        return all(
            self._fits(model.wish, machine, plan.victims, plan.whole, also=(allocation,)) is not None
            for model, plan in earlier
        )

    def _make_way(self, model: _Model, victims: Sequence[_Model], now: float) -> tuple[bool, float]:
        """Whether all that must go can go now, and otherwise when to look again; closes those whose time is up."""
        ready, wake = True, math.inf
        for victim in victims:
            hold = min(max(victim.load_s, model.load_s), self.rules.longest_hold_s)
            closes = max(model.asked[0].at, victim.loaded_at) + hold
            if now >= closes:
                self._closed.add(victim.name)
            opens = closes if victim.users else min(closes, victim.used_at + hold)
            if victim.users or now < opens:
                ready = False
                wake = min(wake, opens if now < opens else math.inf)
        return ready, wake

    def _load(self, model: _Model, allocation: Allocation, now: float) -> Load:
        model.given = model.wish
        model.state, model.allocation, model.began = _State.LOADING, allocation, now
        return Load(model.name, allocation, model.given.context_length)

    def _refuse(self, model: _Model, machine: Machine) -> Refuse:
        shortage = self._shortage(model.wish, machine)
        asks = tuple(ask for ask in model.asked if ask.chosen) or tuple(model.asked)
        model.asked = [ask for ask in model.asked if ask not in asks]
        return Refuse(shortage, asks)

    def _evict(self, model: _Model, why: Why) -> Evict:
        model.state = _State.LEAVING
        self._closed.discard(model.name)
        return Evict(model.name, why)

    def _admit(self, model: _Model) -> None:
        model.users += len(model.asked)
        model.asked.clear()

    def _shortage(self, wish: Wish, machine: Machine) -> Shortage:
        going = self._evictable()
        staying = [m for m in self._models.values() if m.state is not _State.ABSENT and m not in going]
        host = machine.host
        return Shortage(
            model=wish.name,
            needed_bytes=wish.footprint.total_bytes,
            usable_bytes=self._rooms(machine, staying, going, ())[HOST],
            free_bytes=host.free_bytes + sum(self._held(model, HOST, machine) for model in going),
            reserve_bytes=host.reserve_bytes,
            limit_bytes=host.limit_bytes,
            staying=tuple(Held(model.name, model.allocation.host_bytes) for model in staying),
            max_loaded=self.rules.max_loaded if 0 < self.rules.max_loaded <= len(staying) else 0,
        )


def _bytes_on(allocation: Allocation, device: str, machine: Machine) -> int:
    """What an allocation takes of one memory, that of the host counting those devices that share it."""
    own = allocation.bytes_on(device)
    if device == HOST:
        own += sum(allocation.bytes_on(gpu.name) for gpu in machine.gpus if gpu.shares_host)
    return own
