"""What the mesh has of a model, and whether anybody is less than busy."""

from __future__ import annotations

from hypothesis import given

from chorus.core.fleet.directory import Directory
from chorus.core.fleet.records import ModelState, RunnerState
from chorus.core.placement import Needs, Roster, has_quiet_node, node_loads, slots_for
from tests.core import placement_fleet as fleet


def slots(directory: Directory, model: str = "alpha") -> int:
    return slots_for(model, Roster().pool(Needs(model=model), directory).everybody, directory)


def quiet(directory: Directory, **in_flight: int) -> bool:
    return has_quiet_node(node_loads("alpha", sorted(directory.entries), directory), in_flight)


def test_slots_are_those_of_runners_that_could_take_a_request_now() -> None:
    directory = fleet.directory(
        fleet.runner("r1", fleet.model(slots=4), fleet.model("beta", slots=9)),
        fleet.runner("r2", fleet.model("alpha", "alpha.q4", slots=2), fleet.model("alpha", "alpha.q8", slots=3)),
        fleet.runner("r3", fleet.model(slots=1), loads=(fleet.load(total=16),)),
        fleet.runner("r4", fleet.model(), state=RunnerState.DRAINING),
        fleet.runner("r5", fleet.model(), reachable=False),
        fleet.runner("r6", fleet.model(state=ModelState.FAILED)),
        fleet.runner("r7", fleet.model(state=ModelState.AVAILABLE, slots=5)),
    )
    assert slots(directory) == 4 + 3 + 16 + 5
    assert (slots(directory, "alpha.q4"), slots(directory, "beta"), slots(directory, "nothing")) == (2, 9, 0)


def test_a_node_is_as_busy_as_all_that_runs_on_it() -> None:
    def with_loads(used: int, others: int = 0) -> Directory:
        loads = (fleet.load(used=used, total=5), fleet.load("beta.gguf", used=others, total=5))
        return fleet.directory(fleet.runner("r1", fleet.model(slots=5), fleet.model("beta"), loads=loads))

    assert quiet(with_loads(3))
    assert not quiet(with_loads(4))
    assert not quiet(with_loads(2, others=2))
    assert not quiet(with_loads(3), r1=1)
    assert quiet(with_loads(4), r1=-1)
    assert not quiet(fleet.directory())
    # Two runners of one machine are one node.
    together = [
        fleet.runner(name, fleet.model(slots=5), node_id="n", loads=(fleet.load(used=used, total=5),))
        for name, used in (("r1", 5), ("r2", 3))
    ]
    assert not quiet(fleet.directory(*together))
    idle = fleet.runner("r3", fleet.model(slots=1))
    assert quiet(fleet.directory(*together, idle))


@given(fleet.directories())
def test_where_there_is_a_quiet_node_there_are_slots(directory: Directory) -> None:
    pool = Roster().pool(Needs(model="alpha"), directory).everybody
    loads = node_loads("alpha", pool, directory)
    assert [node.share for node in loads] == sorted(node.share for node in loads)
    if has_quiet_node(loads, {}):
        assert slots(directory) > 0
