"""Where a model goes: by hand and over random machines."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from chorus.core.fitting.memory import LoadPlan, ModelShape, estimate_memory
from chorus.core.residency.allocation import Allocation, Share, Wish, allocate
from chorus.core.residency.devices import HOST, Device, Machine, Use
from chorus.core.residency.footprint import Footprint, footprint

FOOTPRINT = Footprint(
    input_bytes=50, layer_bytes=(100,) * 4, output_bytes=50, compute_bytes=10, logits_bytes=5, tied=False
)
WISH = Wish("model", FOOTPRINT, family="family")


def machine(host: int, *gpus: int, **uses: Device) -> tuple[Machine, dict[str, int]]:
    devices = tuple(uses.get(f"CUDA{i}", Device(f"CUDA{i}", room, room)) for i, room in enumerate(gpus))
    there = Machine(Device(HOST, host, host), devices)
    return there, {device.name: device.room(0) for device in there.devices}


def test_without_a_gpu_it_goes_to_the_host_or_nowhere() -> None:
    assert FOOTPRINT.total_bytes == 515
    assert allocate(WISH, *machine(515)) == Allocation(515)
    assert allocate(WISH, *machine(514)) is None
    assert allocate(replace(WISH, gpu_layers=0), *machine(515, 1000)) == Allocation(515)


def test_it_goes_whole_to_the_smallest_gpu_that_holds_it() -> None:
    found = allocate(WISH, *machine(1000, 900, 460, 459))
    assert found == Allocation(host_bytes=50 + 10 + 5, shares=(Share("CUDA1", 5, 460),))
    assert found.gpu_layers == 5
    assert (found.bytes_on("CUDA1"), found.bytes_on("CUDA0"), found.bytes_on(HOST)) == (460, 0, 65)


def test_it_is_split_evenly_over_as_few_gpus_as_hold_it() -> None:
    found = allocate(WISH, *machine(1000, 300, 50, 300))
    assert found is not None
    assert found.shares == (Share("CUDA0", 2, 210), Share("CUDA2", 3, 260))


def test_else_as_many_layers_as_fit_and_the_rest_stays() -> None:
    found = allocate(WISH, *machine(1000, 265))
    assert found == Allocation(host_bytes=50 + 200 + 10 + 5, shares=(Share("CUDA0", 3, 260),))
    assert allocate(WISH, *machine(1000, 265), whole=True) is None
    limited = allocate(replace(WISH, gpu_layers=2), *machine(1000, 900), whole=True)
    assert limited == Allocation(host_bytes=50 + 300 + 10 + 5, shares=(Share("CUDA0", 2, 160),))
    assert allocate(WISH, *machine(1000, 40)) == Allocation(515), "not even the output fits"


def test_a_device_is_for_whom_it_is_for() -> None:
    reserved = Device("CUDA0", 1000, 1000, use=Use.RESERVED)
    own = Device("CUDA1", 1000, 1000, use=Use.DEDICATED, model="family")
    others = Device("CUDA2", 1000, 1000, use=Use.DEDICATED, model="somebody")
    there, rooms = machine(1000, 1, 1, 1, 500, CUDA0=reserved, CUDA1=own, CUDA2=others)
    found = allocate(WISH, there, rooms)
    assert found is not None
    assert [share.device for share in found.shares] == ["CUDA1"], "its own before a smaller one for all"
    assigned = allocate(replace(WISH, family="", only_on=frozenset({"CUDA3"})), there, rooms)
    assert assigned is not None
    assert [share.device for share in assigned.shares] == ["CUDA3"]
    assert allocate(replace(WISH, family="", only_on=frozenset({"CUDA0"})), there, rooms) == Allocation(515)


def test_a_gpu_without_memory_of_its_own_takes_the_hosts() -> None:
    shared = Device("Vulkan0", 10_000, 10_000, shares_host=True)
    there, rooms = machine(525, 1, CUDA0=shared)
    found = allocate(WISH, there, rooms)
    assert found is not None
    assert found.gpu_layers == 5
    there, rooms = machine(524, 1, CUDA0=shared)
    assert allocate(WISH, there, rooms) == Allocation(515)


def test_tied_embeddings_cost_the_host_nothing_twice() -> None:
    tied = replace(FOOTPRINT, tied=True)
    assert tied.total_bytes == 465
    assert tied.on_host(1) == 465, "the copy is on the device"
    assert FOOTPRINT.on_host(1) == 465


SHAPES = st.builds(
    ModelShape,
    weights_bytes=st.integers(0, 1 << 40),
    embedding_length=st.integers(1, 20_000),
    feed_forward_length=st.integers(1, 100_000),
    vocabulary_size=st.integers(0, 500_000),
    head_count=st.integers(1, 256),
    attention_width=st.integers(1, 40_000),
    cache_elements_per_token=st.integers(0, 1 << 20),
    layer_count=st.integers(0, 130),
    input_bytes=st.integers(0, 1 << 30),
    output_bytes=st.integers(0, 1 << 30),
)


@given(SHAPES, st.integers(1, 1 << 16), st.integers(1, 16))
def test_a_footprint_on_the_host_is_the_estimate(shape: ModelShape, context: int, slots: int) -> None:
    whole = shape.input_bytes + shape.output_bytes
    shape = replace(shape, weights_bytes=max(shape.weights_bytes, whole))
    plan = LoadPlan(context, slots)
    assert footprint(shape, plan).total_bytes == estimate_memory(shape, plan).total_bytes


@st.composite
def footprints(draw: st.DrawFn) -> Footprint:
    part = st.integers(0, 200)
    layers = tuple(draw(st.lists(part, min_size=1, max_size=12)))
    return Footprint(draw(part), layers, draw(part), draw(part), draw(part), draw(st.booleans()))


@given(
    footprints(),
    st.integers(-50, 3000),
    st.lists(st.tuples(st.integers(-50, 1200), st.sampled_from([*Use]), st.booleans()), max_size=4),
    st.integers(-1, 15),
    st.booleans(),
)
def test_what_is_allocated_fits_and_all_layers_are_somewhere(
    taken: Footprint, host: int, gpus: list[tuple[int, Use, bool]], layers: int, whole: bool
) -> None:
    there = Machine(
        Device(HOST, host, host),
        tuple(Device(f"CUDA{i}", room, room, 0, use, "model", shared) for i, (room, use, shared) in enumerate(gpus)),
    )
    rooms = {device.name: device.room(0) for device in there.devices}
    wish = Wish("model", taken, gpu_layers=layers)
    found = allocate(wish, there, rooms, whole=whole)
    if found is None:
        assert whole or taken.total_bytes > host
        return
    on_host = found.host_bytes + sum(share.bytes for share in found.shares if gpus[int(share.device[4:])][2])
    assert on_host <= host
    names = [gpu.name for gpu in there.gpus]
    assert [share.device for share in found.shares] == [n for n in names if found.bytes_on(n) or n in
            {share.device for share in found.shares}]  # fmt: skip
    for share in found.shares:
        assert share.layers > 0
        assert share.bytes <= rooms[share.device]
        assert there.gpus[int(share.device[4:])].use is not Use.RESERVED
    most = len(taken.offloadable) if layers < 0 else min(layers, len(taken.offloadable))
    assert found.gpu_layers <= most
    if whole and wish.devices(there) and most:
        assert found.gpu_layers == most
    moved = sum(share.bytes - taken.compute_bytes for share in found.shares)
    assert moved == sum(taken.offloadable[len(taken.offloadable) - found.gpu_layers :])
    assert found.host_bytes == taken.on_host(found.gpu_layers)
    if not whole and layers:
        roomier = allocate(wish, there, {name: room + 500 for name, room in rooms.items()})
        assert roomier is not None
        assert roomier.gpu_layers >= found.gpu_layers
