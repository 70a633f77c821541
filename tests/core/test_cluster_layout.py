"""How a mesh is laid out over nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.cluster.layout import Certificates, Extra, lay_out
from chorus.core.errors import InvalidRequestError

NAMES = st.lists(st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True), max_size=6)


@given(NAMES, NAMES, st.sampled_from(Certificates), st.lists(st.sampled_from(Extra)), st.randoms())
def test_layout_follows_from_the_set_of_nodes(nodes, gpu_nodes, certificates, extras, rng):
    if not nodes and not gpu_nodes:
        with pytest.raises(InvalidRequestError, match="--node"):
            lay_out(nodes, gpu_nodes, ["m"])
        return
    layout = lay_out(nodes, gpu_nodes, ["m"], certificates=certificates, extras=extras)
    every = {*nodes, *gpu_nodes}
    assert set(layout.nodes) == every
    assert set(layout.gpu_nodes) <= every
    assert 1 <= layout.registries == layout.coordinators <= len(every)
    assert layout.spread <= (len(every) >= layout.registries)
    assert ("gpu-nvidia" in layout.components) == bool(gpu_nodes)
    assert ("node-drain" in layout.components) == (len(every) > 1)
    assert len(set(layout.components)) == len(layout.components)
    # It changes the runners of gpu-nvidia, and extras change the Job that it brings.
    (mtls,) = (at for at, name in enumerate(layout.components) if name.startswith("mtls-"))
    assert set(layout.components[:mtls]) <= {"gpu-nvidia"}
    assert layout.components[mtls] == f"mtls-{certificates}"
    shuffled = [*nodes, *gpu_nodes]
    rng.shuffle(shuffled)
    assert lay_out(shuffled, gpu_nodes, ["m"], certificates=certificates, extras=extras) == layout


@pytest.mark.parametrize("name", ["", "Desktop", "a.b", "-a", "a_b", "x" * 64])
def test_a_node_that_can_be_no_runner_is_refused(name):
    with pytest.raises(InvalidRequestError, match="--node"):
        lay_out([name], [], ["m"])


@pytest.mark.parametrize("models", [[], [""], ["a b"], ["--force"], ["a\n"]])
def test_what_names_no_model_is_refused(models):
    with pytest.raises(InvalidRequestError, match="--model"):
        lay_out(["a"], [], models)
