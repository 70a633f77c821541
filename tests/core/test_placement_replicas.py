"""Copies of models follow demand: enough of them, on the machines that every coordinator chooses, and without flapping.

A mesh is simulated in which demand changes: requests of a model spread over its copies, loads take a while, and each
coordinator looks at its own moment at reports that may be old.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import Load, ModelState
from chorus.core.placement import LoadReason, Replicas, Situation, Wanted, load_times
from chorus.core.placement.replicas import FORESEEN_S, SETTLE_S
from tests.core import placement_fleet as fleet

NOW = Situation()
SLOTS, LOAD_S, BUSY_S = 4, 12.0, 10.0
FAMILIES = ("alpha", "beta", "gamma")
SIZE = 6 * fleet.GIB  # one fits into a machine of 8 GiB beside nothing else


def entry(
    name: str, states: dict[str, ModelState], busy: dict[str, int] | None = None, *, free: int = 0
) -> DirectoryEntry:
    """A runner with models in these states; `busy` requests for each that is loaded."""
    models = [fleet.model(family, state=state, slots=SLOTS, size_bytes=SIZE) for family, state in states.items()]
    loads = tuple(
        fleet.load(f"{family}.gguf", used=min(SLOTS, count), total=SLOTS, queued=max(0, count - SLOTS))
        for family, count in (busy or {}).items()
    )
    made = fleet.runner(name, *models, memory=8 * fleet.GIB)
    record = replace(made.record, load=Load(loads, memory_available_bytes=free or 8 * fleet.GIB))
    return replace(made, record=record)


@dataclass
class Machine:
    """`loaded` is what is in memory (one model at most), `until` when what is being loaded is."""

    loaded: str = ""
    loading: str = ""
    until: float = 0.0


@dataclass
class Mesh:
    """Machines that have every model on disk, and who asks for what."""

    machines: dict[str, Machine]
    demand: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[float, int, str, str]] = field(default_factory=list)
    loads: int = 0

    def busy(self, family: str) -> int:
        copies = sum(machine.loaded == family for machine in self.machines.values())
        return -(-self.demand.get(family, 0) // copies) if copies else 0

    def directory(self) -> Directory:
        entries = []
        for name, machine in self.machines.items():
            states = dict.fromkeys(FAMILIES, ModelState.AVAILABLE)
            if machine.loaded:
                states[machine.loaded] = ModelState.LOADED
            if machine.loading:
                states[machine.loading] = ModelState.LOADING
            busy = {machine.loaded: self.busy(machine.loaded)} if machine.loaded else {}
            free = 8 * fleet.GIB if not (machine.loaded or machine.loading) else 2 * fleet.GIB
            entries.append(entry(name, states, busy, free=free))
        return fleet.directory(*entries)

    def ask(self, wanted: Wanted, coordinator: int, now: float) -> None:
        machine = self.machines[wanted.entry.record.runner.runner_id]
        family = wanted.model.artifact.family
        self.asked.append((now, coordinator, wanted.entry.record.runner.runner_id, family))
        if family == machine.loaded or machine.loading:
            return  # it is there, or its turn comes
        assert not machine.loaded or not self.demand.get(machine.loaded), "a model in use had to go"
        machine.loaded, machine.loading, machine.until = "", family, now + LOAD_S
        self.loads += 1

    def step(self, now: float) -> None:
        for machine in self.machines.values():
            if machine.loading and now >= machine.until:
                machine.loaded, machine.loading = machine.loading, ""

    def copies(self, family: str) -> int:
        return sum(machine.loaded == family for machine in self.machines.values())


def run(demands: list[dict[str, int]], *, coordinators: int, seed: int, machines: int = 6, phase_s: int = 150) -> Mesh:
    """Each demand for so many seconds. The first machines have one copy of each model."""
    names = [f"r{number}" for number in range(machines)]
    mesh = Mesh({name: Machine(FAMILIES[index] if index < 3 else "") for index, name in enumerate(names)})
    rng = Random(seed)
    deciders = [Replicas(busy_s=BUSY_S) for _ in range(coordinators)]
    phases = [rng.random() for _ in deciders]
    seen = mesh.directory()
    for now in range(len(demands) * phase_s):
        mesh.demand = demands[now // phase_s]
        mesh.step(float(now))
        for number in sorted(range(coordinators), key=lambda one: phases[one]):
            # Half of the time the report is that of a second ago.
            directory = mesh.directory() if rng.random() < 0.5 else seen
            found = deciders[number].wanted(directory, NOW, now + phases[number], waiting={}, likely={})
            for wanted in found:
                mesh.ask(wanted, number, now + phases[number])
        seen = mesh.directory()
    return mesh


@given(st.lists(st.integers(0, 15), min_size=3, max_size=3), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_there_are_as_many_copies_as_demand_asks_for_and_no_more_loads_than_that(
    demand: list[int], coordinators: int, seed: int
) -> None:
    if sum(demand) > 36:  # more than all machines can do, whatever is loaded where
        demand = [count // 2 for count in demand]
    asked = dict(zip(FAMILIES, demand, strict=True))
    mesh = run([asked], coordinators=coordinators, seed=seed)
    # A copy more for as long as nine tenths of all slots are taken, while there is a machine that it may have.
    spare = sum(not machine.loaded for machine in mesh.machines.values())
    for family in FAMILIES:
        full = mesh.demand[family] and mesh.busy(family) * mesh.copies(family) >= 0.9 * SLOTS * mesh.copies(family)
        assert not (full and spare), family
        wanted = max(1, -(-asked[family] * 10 // (9 * SLOTS)) + 1)
        assert mesh.copies(family) <= wanted
    assert mesh.loads <= 6


def test_demand_that_moves_from_one_model_to_another_is_followed_once() -> None:
    busy_alpha, busy_beta = {"alpha": 14, "beta": 1}, {"alpha": 0, "beta": 14}
    mesh = run([busy_alpha, busy_beta, busy_beta], coordinators=2, seed=3)
    assert mesh.copies("beta") >= 4
    loads = mesh.loads
    again = run([busy_alpha, busy_beta, busy_beta, busy_beta], coordinators=2, seed=3)
    assert again.loads == loads  # nothing moves once demand stays
    # Whatever one coordinator asked for, the other did, too, or saw that it was being done.
    places = {(runner, family) for _, _, runner, family in mesh.asked}
    assert len(places) == loads


def test_load_that_goes_up_and_down_around_the_limit_loads_one_copy() -> None:
    wobbling = [{"alpha": 4 if number % 2 else 3} for number in range(40)]
    assert run(wobbling, coordinators=2, seed=1, phase_s=5).loads == 0
    steady = run([{"alpha": 4}, *wobbling], coordinators=2, seed=1, phase_s=30)
    assert steady.loads == 1


def test_a_short_rush_and_who_waits_here() -> None:
    directory = fleet.directory(
        entry("r1", {"alpha": ModelState.LOADED}, {"alpha": 2}), entry("r2", {"alpha": ModelState.AVAILABLE})
    )
    replicas = Replicas(busy_s=BUSY_S)

    def asked(now: float, waiting: int) -> list[str]:
        found = replicas.wanted(directory, NOW, now, waiting={"alpha.gguf": waiting}, likely={})
        return [wanted.entry.record.runner.runner_id for wanted in found]

    assert asked(0.0, 2) == []
    assert asked(9.0, 2) == []
    assert asked(9.5, 0) == []  # it is over
    assert asked(10.0, 2) == []
    assert asked(20.0, 2) == ["r2"]
    assert asked(35.0, 2) == []  # it takes a while, and time to settle


def test_one_machine_has_one_copy_and_who_refused_is_not_asked_again() -> None:
    there = fleet.runner("r0", fleet.model("alpha", slots=SLOTS), node_id="n", loads=(fleet.load(used=4),))
    beside = fleet.runner("r1", fleet.model("alpha", state=ModelState.AVAILABLE), node_id="n")
    paid = fleet.runner("r2", fleet.model("alpha", state=ModelState.AVAILABLE, engine="paid"))
    other = fleet.runner("r3", fleet.model("alpha", state=ModelState.AVAILABLE))
    replicas = Replicas(busy_s=1e-9)
    directory = fleet.directory(there, beside, paid, other)
    assert replicas.wanted(directory, NOW, 0.0, waiting={}, likely={}) == []
    (wanted,) = replicas.wanted(directory, NOW, 1.0, waiting={}, likely={})
    assert (wanted.entry, wanted.reason) == (other, LoadReason.DEMAND)
    replicas.refused(wanted, 1.0)
    replicas.wanted(directory, NOW, 2.0, waiting={}, likely={})
    assert replicas.wanted(directory, NOW, 3.0, waiting={}, likely={}) == []
    off = Replicas(busy_s=0.0)
    assert not any(off.wanted(directory, NOW, float(now), waiting={}, likely={}) for now in range(100))


def test_what_is_likely_is_loaded_where_it_takes_nobody_s_memory() -> None:
    cold, warm = ModelState.AVAILABLE, ModelState.LOADED
    likely = {"gamma": 0.7, "nowhere": 0.9}

    def place(*entries: DirectoryEntry, also: dict[str, float] | None = None) -> list[str]:
        directory = fleet.directory(*entries)
        found = Replicas(busy_s=0.0).wanted(directory, NOW, 0.0, waiting={}, likely={**likely, **(also or {})})
        assert all(wanted.reason is LoadReason.PATTERN for wanted in found)
        return [f"{wanted.entry.record.runner.runner_id} {wanted.model.artifact.family}" for wanted in found]

    full = 2 * fleet.GIB
    in_use = entry("r1", {"alpha": warm, "gamma": cold}, {"alpha": 1}, free=full)
    idle = entry("r2", {"beta": warm, "gamma": cold}, {"beta": 0}, free=full)
    assert place(in_use) == []
    assert place(in_use, idle) == ["r2 gamma"]
    assert place(in_use, idle, also={"beta": 0.8}) == []  # which will be asked for itself
    empty = entry("r3", {"gamma": cold})
    assert place(in_use, idle, empty) == ["r3 gamma"]
    assert place(empty, entry("r4", {"gamma": warm}, {"gamma": 0})) == []  # it is there
    assert place(empty, entry("r4", {"gamma": ModelState.LOADING})) == []


def test_a_copy_that_another_coordinator_asked_for_has_to_show_first_what_it_changes() -> None:
    def directory(second: ModelState) -> Directory:
        return fleet.directory(
            entry("r1", {"alpha": ModelState.LOADED}, {"alpha": 9}),
            entry("r2", {"alpha": second}, {"alpha": 9} if second is ModelState.LOADED else None),
            entry("r3", {"alpha": ModelState.AVAILABLE}),
        )

    replicas = Replicas(busy_s=BUSY_S)

    def asked(now: float, second: ModelState) -> int:
        return len(replicas.wanted(directory(second), NOW, now, waiting={}, likely={}))

    assert asked(0.0, ModelState.LOADING) == asked(12.0, ModelState.LOADING) == 0
    assert asked(13.0, ModelState.LOADED) == asked(21.0, ModelState.LOADED) == 0
    assert asked(23.0, ModelState.LOADED) == 1


def foreseen(likely: list[dict[str, float]], seconds: int) -> int:
    """Loads of one machine with place for one model, while each coordinator foresees something."""
    mesh = Mesh({"r1": Machine("alpha")})
    deciders = [Replicas(busy_s=BUSY_S) for _ in likely]
    for now in range(seconds):
        mesh.step(float(now))
        directory = mesh.directory()
        known = load_times(directory)
        for number, (replicas, foresees) in enumerate(zip(deciders, likely, strict=True)):
            told = {family: chance for family, chance in foresees.items() if family in known}
            for wanted in replicas.wanted(directory, NOW, float(now), waiting={}, likely=told):
                mesh.ask(wanted, number, float(now))
    return mesh.loads


def test_models_that_are_usual_at_one_time_do_not_take_turns_with_one_place() -> None:
    assert foreseen([{"beta": 0.7, "gamma": 0.7}], 900) == 1
    # Coordinators foresee different things, and don't know what the others do.
    assert foreseen([{"beta": 0.7}, {"gamma": 0.7}], int(FORESEEN_S)) <= 2


def test_load_times_are_of_what_is_on_disk_and_nothing_for_what_somebody_has_in_memory() -> None:
    directory = fleet.directory(
        entry("r1", {"alpha": ModelState.AVAILABLE, "beta": ModelState.LOADED}),
        entry("r2", {"beta": ModelState.AVAILABLE, "gamma": ModelState.FAILED}),
    )
    times = load_times(directory)
    assert times == {"alpha": times["alpha"], "beta": 0.0}
    assert 0.0 < times["alpha"] < SETTLE_S
