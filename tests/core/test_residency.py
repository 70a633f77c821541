"""Who is in memory: random worlds of requests, time and foreign work, and the rules by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chorus.core.errors import InvalidRequestError
from chorus.core.residency.allocation import Allocation, Wish
from chorus.core.residency.devices import HOST, Device, Machine, Use
from chorus.core.residency.footprint import Footprint
from chorus.core.residency.residents import Admit, Ask, Evict, Load, Nothing, Refuse, Residency, Rules, Why
from chorus.core.residency.shortage import Held, Shortage

GIB = 1 << 30


def wish(name: str, size: int = 100, layers: int = 4, **changes: object) -> Wish:
    each = size // (layers + 1)
    footprint = Footprint(input_bytes=size - each * layers, layer_bytes=(each,) * layers, output_bytes=each,
                          compute_bytes=0, tied=True)  # fmt: skip
    return replace(Wish(name, footprint), **changes)  # type: ignore[arg-type]


class World:
    """A residency with a clock and `total` bytes of memory; loads take `load_s` and are carried out at once.

    Programs of somebody else hold `foreign` bytes.
    """

    def __init__(self, total: int, rules: Rules | None = None, *, load_s: float = 1.0, reserve: int = 0) -> None:
        self.total, self.load_s, self.reserve, self.foreign = total, load_s, reserve, 0
        self.residency = Residency(rules or Rules())
        self.now = 0.0
        self.names: set[str] = set()
        self.done: list[str] = []
        self.until = math.inf

    @property
    def machine(self) -> Machine:
        allocations = [self.residency.allocation(name) for name in self.names]
        held = sum(allocation.host_bytes for allocation in allocations if allocation is not None)
        return Machine(Device(HOST, self.total - held - self.foreign, self.total - self.reserve, self.reserve))

    def ask(self, name: str, size: int = 100, **changes: object) -> bool:
        return self.waits(name, size, **changes) is None

    def waits(self, name: str, size: int = 100, *, chosen: bool = False, **changes: object) -> Ask | None:
        self.names.add(name)
        return self.residency.ask(wish(name, size, **changes), self.now, chosen=chosen)

    def leave(self, name: str) -> None:
        self.residency.leave(name, self.now)

    def settle(self) -> list[str]:
        """Carries decisions out until there are none; says which."""
        done: list[str] = []
        while True:
            decision = self.residency.decide(self.now, self.machine)
            self.residency.validate(self.machine)
            match decision:
                case Load(name):
                    self.now += self.load_s
                    self.residency.loaded(name, self.now)
                    done.append(f"+{name}")
                case Evict(name):
                    self.residency.gone(name)
                    done.append(f"-{name}")
                case Refuse(shortage):
                    done.append(f"!{shortage.model}")
                case Admit(name):
                    done.append(f"={name}")
                case Nothing(until):
                    self.until = until
                    self.done += done
                    return done

    def use(self, name: str, size: int = 100, **changes: object) -> list[str]:
        """One request from its beginning to its end."""
        done = [] if self.ask(name, size, **changes) else self.settle()
        self.leave(name)
        return done


def test_what_fits_is_loaded_and_stays() -> None:
    world = World(300)
    assert [world.use(name) for name in "abcabc"] == [["+a"], ["+b"], ["+c"], [], [], []]
    assert world.settle() == []


def test_the_least_recently_used_makes_room_and_no_more_than_needed() -> None:
    world = World(300, load_s=0)
    for name in "abca":
        world.use(name)
        world.now += 1
    assert world.use("d") == ["-b", "+d"]
    world.now += 1
    assert world.use("e", 200) == ["-c", "-a", "+e"]
    world = World(300, load_s=0)
    world.use("small", 50)
    world.now += 1
    world.use("large", 200)
    world.now += 1
    assert world.use("new", 150) == ["-large", "+new"], "the small one alone would not do, nor is it needed then"


def test_a_pinned_model_stays_and_one_in_use_is_waited_for() -> None:
    world = World(200, load_s=0)
    world.use("pinned", pinned=True)
    world.ask("busy")
    world.settle()
    assert not world.ask("new")
    assert world.settle() == []
    world.leave("busy")
    assert world.settle() == ["-busy", "+new"]
    world.leave("new")


def test_one_that_never_fits_is_refused_with_numbers() -> None:
    world = World(4 * GIB, reserve=GIB)
    world.use("pinned", GIB, pinned=True)
    world.foreign = GIB
    assert not world.ask("big", 3 * GIB // 2)
    decision = world.residency.decide(world.now, world.machine)
    assert isinstance(decision, Refuse)
    error = decision.shortage.error
    for said in ("big needs about 1,536 MiB", "can use 1,024 MiB", "2,048 MiB are free", "1,024 MiB are kept",
                 "runner.memory_reserve_gib", "lower that reserve", "pinned (1,024 MiB)"):  # fmt: skip
        assert said in error.message
    assert error.metadata == {
        "required_bytes": str(3 * GIB // 2),
        "available_bytes": str(GIB),
    }
    assert not world.residency.anybody_waits


def test_the_error_says_what_stands_in_the_way() -> None:
    held = (Held("a", GIB),)
    capped = Shortage("b", 2 * GIB, GIB, 9 * GIB, GIB, 2 * GIB, held)
    assert "may take 2,048 MiB (runner.memory_limit_gib)" in capped.error.message
    assert "raise that limit or unpin a model" in capped.error.message
    full = Shortage("b", 1, GIB, GIB, 0, GIB, held, max_loaded=1)
    assert "1 models may be in memory (runner.max_loaded_models)" in full.error.message
    tight = Shortage("b", 2 * GIB, 0, GIB, 2 * GIB, 9 * GIB)
    assert "can use 0 MiB" in tight.error.message
    assert "close other programs" in tight.error.message


def test_foreign_memory_is_respected_and_free_memory_is_what_counts() -> None:
    world = World(1000, reserve=50)
    world.use("a", 300)
    world.foreign = 450
    assert world.use("b", 200) == ["+b"]
    world.now += 10
    assert world.use("c", 250) == ["-a", "+c"]
    world.foreign = 900
    world.now += 10
    assert not world.ask("d", 600)
    assert world.settle() == ["!d"]
    world.foreign = 0
    assert world.use("d", 600) == ["-b", "+d"]


def test_only_so_many_are_loaded() -> None:
    world = World(1000, Rules(max_loaded=2), load_s=0)
    for name in "ab":
        world.use(name)
        world.now += 1
    assert world.use("c") == ["-a", "+c"]
    world = World(1000, Rules(max_loaded=1), load_s=0)
    world.use("a", pinned=True)
    assert not world.ask("b")
    assert world.settle() == ["!b"]


def test_an_idle_model_goes_when_its_time_is_up() -> None:
    world = World(1000, Rules(keep_alive_s=60), load_s=0)
    world.use("pinned", pinned=True)
    world.ask("a")
    world.settle()
    world.now = 500
    assert world.settle() == [], "it is in use"
    world.leave("a")
    assert world.settle() == []
    assert world.until == 560
    world.now = 559
    assert world.settle() == []
    world.use("a")
    world.now = 618
    assert world.settle() == []
    world.now = 619
    decision = world.residency.decide(world.now, world.machine)
    assert decision == Evict("a", Why.IDLE)
    world.residency.gone("a")
    assert world.settle() == []
    assert world.until == math.inf


# --- swaps ----------------------------------------------------------------------------------------------------------


def test_alternating_requests_share_swaps() -> None:
    """Two clients ask for two models in turn, each as soon as its last answer is there: 100 ms an answer."""
    world = World(100, load_s=1.0)
    answered = {"a": 0, "b": 0}
    waits: dict[str, float] = {}
    working: dict[str, float] = {}
    for name in "ab":
        waits[name] = world.now
        world.ask(name)
    longest = 0.0
    while world.now < 60:
        for done in world.settle():
            name = done[1:]
            if done[0] in "+=" and name in waits:
                longest = max(longest, world.now - waits.pop(name))
                working[name] = world.now + 0.1
        world.now = min([*working.values(), world.until, world.now + 0.05])
        for name in [name for name, end in working.items() if end <= world.now]:
            del working[name]
            world.leave(name)
            answered[name] += 1
            if world.ask(name):
                working[name] = world.now + 0.1
            else:
                waits[name] = world.now
    loads = sum(done[0] == "+" for done in world.done)
    assert answered["a"] + answered["b"] > 8 * loads
    assert min(answered.values()) > 0.8 * max(answered.values())
    assert longest < 4.0, "a load, the hold and the answers under way"


def test_requests_that_wait_are_served_by_one_load() -> None:
    world = World(100, load_s=1.0)
    world.ask("a")
    world.settle()
    for _ in range(5):
        assert not world.ask("b")
        assert world.ask("a"), "it is loaded, and b has only begun to wait"
        world.settle()
    world.now += 1.0
    assert world.settle() == []
    assert not world.ask("a"), "b has waited as long as a load takes"
    for _ in range(6):
        world.leave("a")
    assert world.settle() == ["-a", "+b"]
    world.now += 5
    for _ in range(5):
        assert world.settle() == []
        world.leave("b")
    assert world.settle() == ["-b", "+a"]


def test_a_model_that_is_idle_for_long_goes_at_once() -> None:
    world = World(100, load_s=1.0)
    world.use("a")
    world.now += 1.0
    assert world.use("b") == ["-a", "+b"]
    assert not world.ask("a")
    assert world.settle() == [], "b was used just now; somebody may ask for it again"
    assert world.until == world.now + 1.0
    world.now = world.until
    assert world.settle() == ["-b", "+a"]


def test_one_that_fits_beside_them_does_not_wait_for_those_who_wait() -> None:
    world = World(300, load_s=0)
    world.ask("busy", 200)
    world.settle()
    assert not world.ask("large", 250)
    assert world.settle() == []
    assert not world.ask("small", 50), "beside it there is room"
    assert world.settle() == ["+small"]
    assert not world.ask("other", 100)
    assert world.settle() == [], "with it, the large one would not fit when its turn comes"
    world.leave("busy")
    world.leave("small")
    assert world.settle() == ["-busy", "+large"]


def test_who_gives_up_opens_the_model_again() -> None:
    world = World(100, load_s=1.0)
    world.ask("a")
    world.settle()
    gives_up = world.waits("b")
    assert gives_up is not None
    world.now += 1.0
    world.settle()
    assert not world.ask("a")
    assert world.residency.place_in_queue("b") == 0
    world.residency.withdraw(gives_up)
    assert world.settle() == ["=a"]
    assert world.ask("a")
    assert world.residency.place_in_queue("b") == 0


def test_who_chooses_a_context_has_it_and_who_chooses_another_is_told() -> None:
    world = World(300)
    assert not world.ask("a", 100, context_length=8)
    first = world.waits("a", 250, context_length=60, chosen=True)
    assert first is not None
    with pytest.raises(InvalidRequestError, match="a is about to be loaded with 60"):
        world.waits("a", 120, context_length=10, chosen=True)
    world.residency.withdraw(first)
    assert world.waits("a", 120, context_length=10, chosen=True)
    decision = world.residency.decide(world.now, world.machine)
    assert decision == Load("a", Allocation(120), 10), "planned for the very context that it is loaded with"
    with pytest.raises(InvalidRequestError, match="a is being loaded with 10"):
        world.waits("a", 100, context_length=8, chosen=True)
    assert not world.ask("a", 100, context_length=8), "who chooses none takes what comes"
    world.residency.loaded("a", world.now)
    with pytest.raises(InvalidRequestError, match="a is loaded with 10"):
        world.waits("a", 250, context_length=60, chosen=True)
    assert world.ask("a", 120, context_length=10, chosen=True)
    assert world.ask("a", 100, context_length=8)


def test_a_context_that_does_not_fit_costs_those_alone_who_chose_it() -> None:
    world = World(300)
    modest = world.waits("a", 100, context_length=8)
    greedy = world.waits("a", 900, context_length=60, chosen=True)
    decision = world.residency.decide(world.now, world.machine)
    assert isinstance(decision, Refuse)
    assert decision.asks == (greedy,)
    assert decision.shortage.needed_bytes == 900
    assert modest is not None
    assert world.settle() == ["+a"]
    assert world.residency.allocation("a") == Allocation(100)


def test_nothing_is_decided_while_something_is_on_its_way() -> None:
    residency, machine = Residency(Rules()), World(1000).machine
    residency.ask(wish("a"), 0.0)
    assert isinstance(residency.decide(0.0, machine), Load)
    residency.ask(wish("b"), 0.0)
    assert residency.decide(0.0, machine) == Nothing()
    assert residency.place_in_queue("b") == 1
    residency.gone("a")  # it could not be loaded
    assert isinstance(residency.decide(0.0, machine), Load)
    residency.loaded("a", 0.0)
    residency.leaving("a")
    assert residency.ask(wish("a"), 0.0)
    assert residency.decide(0.0, machine) == Nothing()
    residency.gone("a")
    assert residency.decide(0.0, machine) == Load("a", Allocation(100), 0)
    residency.leaving("a")
    assert not residency.loaded("a", 0.0), "its owner did not wait for it"
    assert not residency.is_loaded("a")
    assert residency.decide(0.0, machine) == Nothing()
    with pytest.raises(ValueError, match="nobody uses b"):
        residency.leave("b", 0.0)


# --- any world ------------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d", "e")
CONTEXTS = (8, 1, 60)  # the first one is what the settings say; each token is a byte


class AnyWorld(RuleBasedStateMachine):
    """Requests come, end and give up, foreign programs take memory, models are unloaded by hand, time goes by."""

    @initialize(
        sizes=st.lists(st.integers(10, 120), min_size=len(NAMES), max_size=len(NAMES)),
        pinned=st.sets(st.sampled_from(NAMES), max_size=2),
        gpus=st.lists(st.integers(20, 150), max_size=3),
        max_loaded=st.integers(0, 3),
        keep_alive=st.sampled_from([0.0, 3.0]),
        reserve=st.integers(0, 20),
        uses=st.lists(st.sampled_from([*Use]), min_size=3, max_size=3),
    )
    def begin(
        self,
        sizes: list[int],
        pinned: set[str],
        gpus: list[int],
        max_loaded: int,
        keep_alive: float,
        reserve: int,
        uses: list[Use],
    ) -> None:
        self.wishes = {
            (name, context): wish(name, size + context, pinned=name in pinned, context_length=context)
            for name, size in zip(NAMES, sizes, strict=True)
            for context in CONTEXTS
        }
        self.totals = {HOST: 200, **{f"CUDA{i}": size for i, size in enumerate(gpus)}}
        self.uses = dict(zip(list(self.totals)[1:], uses, strict=False))
        self.reserve = reserve
        self.foreign = dict.fromkeys(self.totals, 0)
        self.rules = Rules(max_loaded=max_loaded, keep_alive_s=keep_alive, longest_hold_s=2.0)
        self.residency = Residency(self.rules)
        self.now = 0.0
        self.loading: str | None = None
        self.context: dict[str, int] = {}  # of those in memory or on their way there
        self.loaded_names: set[str] = set()
        self.inside = dict.fromkeys(NAMES, 0)
        self.waiting: dict[str, list[Ask]] = {name: [] for name in NAMES}

    def machine(self) -> Machine:
        def device(name: str) -> Device:
            used = sum(
                allocation.bytes_on(name)
                for model in NAMES
                if (allocation := self.residency.allocation(model)) is not None
            )
            total = self.totals[name]
            free = max(total - used - self.foreign[name], 0)
            use = self.uses.get(name, Use.DYNAMIC)
            return Device(name, free, max(total - self.reserve, 0), self.reserve, use, "a" if name != HOST else "")

        host_device, *gpus = map(device, self.totals)
        return Machine(host_device, tuple(gpus))

    def admit(self, name: str) -> None:
        self.inside[name] += len(self.waiting[name])
        self.waiting[name].clear()

    def step(self) -> bool:
        machine = self.machine()
        decision = self.residency.decide(self.now, machine)
        match decision:
            case Load(name, allocation, context):
                assert self.loading is None
                assert self.waiting[name]
                assert {ask.wish.context_length for ask in self.waiting[name] if ask.chosen} <= {context}
                assert any(ask.wish.context_length == context for ask in self.waiting[name])
                if not allocation.shares:
                    assert allocation.host_bytes == self.wishes[name, context].footprint.total_bytes
                self.context[name] = context
                for device in machine.devices:
                    after = device.free_bytes - allocation.bytes_on(device.name)
                    assert not allocation.bytes_on(device.name) or after >= self.reserve
                    assert not allocation.bytes_on(device.name) or device.takes(name)
                self.loading = name
            case Evict(name):
                assert name in self.loaded_names
                assert not self.wishes[name, 1].pinned
                assert not self.inside[name]
                self.loaded_names.discard(name)
                self.residency.gone(name)
            case Refuse(shortage, asks):
                assert asks
                for ask in asks:
                    assert ask.wish.footprint.total_bytes == shortage.needed_bytes or not ask.chosen
                    self.waiting[shortage.model].remove(ask)
                assert not any(ask.chosen for ask in self.waiting[shortage.model])
            case Admit(name):
                assert name in self.loaded_names
                assert self.waiting[name]
                self.admit(name)
            case Nothing(until):
                assert until > self.now
                return False
        return True

    def finish_load(self, succeeds: bool = True) -> None:
        name, self.loading = self.loading, None
        assert name is not None
        if succeeds:
            self.residency.loaded(name, self.now)
            self.loaded_names.add(name)
            self.admit(name)
        else:
            self.residency.gone(name)
            for ask in self.waiting[name]:
                self.residency.withdraw(ask)
            self.waiting[name].clear()

    @rule(name=st.sampled_from(NAMES))
    def ask(self, name: str) -> None:
        self.enter(name, self.residency.ask(self.wishes[name, CONTEXTS[0]], self.now))

    @rule(name=st.sampled_from(NAMES), context=st.sampled_from(CONTEXTS))
    def ask_with_a_context(self, name: str, context: int) -> None:
        others = {ask.wish.context_length for ask in self.waiting[name] if ask.chosen}
        if name in self.loaded_names or name == self.loading:
            others.add(self.context[name])
        try:
            ask = self.residency.ask(self.wishes[name, context], self.now, chosen=True)
        except InvalidRequestError:
            assert others - {context}
        else:
            assert others <= {context}
            self.enter(name, ask)

    def enter(self, name: str, ask: Ask | None) -> None:
        if ask is None:
            assert name in self.loaded_names
            self.inside[name] += 1
        else:
            self.waiting[name].append(ask)

    @rule(name=st.sampled_from(NAMES))
    def leave(self, name: str) -> None:
        if self.inside[name]:
            self.inside[name] -= 1
            self.residency.leave(name, self.now)

    @rule(name=st.sampled_from(NAMES))
    def give_up(self, name: str) -> None:
        if self.waiting[name]:
            self.residency.withdraw(self.waiting[name].pop())

    @rule()
    def decide(self) -> None:
        self.step()

    @precondition(lambda self: self.loading is not None)
    @rule(succeeds=st.booleans())
    def end_of_load(self, succeeds: bool) -> None:
        self.finish_load(succeeds)

    @rule(seconds=st.floats(0, 3))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=st.sampled_from(NAMES))
    def unload_by_hand(self, name: str) -> None:
        if name in self.loaded_names:
            self.residency.leaving(name)
            self.residency.gone(name)
            self.loaded_names.discard(name)

    @rule(place=st.integers(0, 3), taken=st.integers(0, 100))
    def foreign_work(self, place: int, taken: int) -> None:
        names = list(self.totals)
        self.foreign[names[place % len(names)]] = taken

    @rule()
    def everybody_has_their_turn(self) -> None:
        """Once those inside leave and loads succeed, nobody waits for long."""
        for _ in range(40):
            while self.step():
                if self.loading is not None:
                    self.now += 0.5
                    self.finish_load()
            if self.loading is not None:
                self.now += 0.5
                self.finish_load()
            for name in NAMES:
                while self.inside[name]:
                    self.leave(name)
            if not any(self.waiting.values()):
                return
            self.now += 0.5
        raise AssertionError(f"somebody waits for ever: {self.waiting}")

    @invariant()
    def all_agree(self) -> None:
        if not hasattr(self, "residency"):
            return
        self.residency.validate(self.machine())
        assert self.residency.anybody_waits == any(self.waiting.values())
        for name in NAMES:
            assert self.residency.is_loaded(name) == (name in self.loaded_names)


TestAnyWorld = AnyWorld.TestCase
TestAnyWorld.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
