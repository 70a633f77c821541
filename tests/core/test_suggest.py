"""Which models suit which machine."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.fitting.memory import MemoryEstimate
from chorus.core.fitting.suggest import GIB, Candidate, Verdict, describe_bytes, suggest
from chorus.core.fleet.records import Cpu, Gpu, Node, Tier


def node(memory_gib: float, *gpus_gib: float, cores: int = 8, free: float = 1.0, usable: bool = True) -> Node:
    return Node(
        node_id="node-1",
        hostname="desk",
        os="Linux x86_64",
        cpu=Cpu("a processor", cores, 2 * cores),
        memory_total_bytes=int(memory_gib * GIB),
        memory_available_bytes=int(memory_gib * GIB * free),
        gpus=tuple(
            Gpu(index, f"uuid-{index}", "a GPU", int(gib * GIB), int(gib * GIB * free), usable=usable)
            for index, gib in enumerate(gpus_gib)
        ),
    )


def model(billions: float, weights_gib: float, *tags: str, name: str = "") -> Candidate:
    parameters = int(billions * 1e9)
    weights = int(weights_gib * GIB)
    name = name or f"m{billions}b"
    return Candidate(
        family=name,
        artifact=f"{name}.Q4_K_M",
        quantization="Q4_K_M",
        parameter_count=parameters,
        size_bytes=weights,
        tier=Tier.of_parameters(parameters),
        tags=tags or ("chat",),
        context_tokens=4096,
        memory=MemoryEstimate(weights, weights // 8, weights // 16, 0),
    )


def verdicts(machine: Node, *models: Candidate) -> dict[str, Verdict]:
    return {s.candidate.family: s.verdict for s in suggest(machine, models)}


def test_the_most_capable_model_that_fits_the_gpu_is_recommended() -> None:
    small, middle, large = model(3, 2), model(8, 5), model(32, 20)
    assert verdicts(node(32, 8), small, middle, large) == {
        "m3b": Verdict.FITS,
        "m8b": Verdict.RECOMMENDED,
        "m32b": Verdict.FITS,  # beside the GPU, in memory, and slow
    }


def test_a_slow_model_on_a_cpu_is_not_recommended_but_fits() -> None:
    quick, slow = model(1, 1), model(14, 9)
    suggestions = suggest(node(64), [slow, quick])
    assert [s.verdict for s in suggestions] == [Verdict.RECOMMENDED, Verdict.FITS]
    assert suggestions[0].candidate is quick
    assert "tokens/s" in suggestions[1].why


def test_where_every_chat_model_is_slow_the_quickest_is_recommended_and_said_to_be_slow() -> None:
    suggestions = suggest(node(64, cores=1), [model(14, 9), model(8, 5)])
    assert suggestions[0].verdict is Verdict.RECOMMENDED
    assert suggestions[0].candidate.family == "m8b"
    assert "slow" in suggestions[0].why


def test_one_is_recommended_for_each_purpose() -> None:
    chat, code, vectors = model(4, 2.5), model(7, 3, "code", name="coder"), model(0.1, 0.1, "embedding", name="vectors")
    assert verdicts(node(32, 24), chat, code, vectors) == {
        "m4b": Verdict.RECOMMENDED,
        "coder": Verdict.RECOMMENDED,
        "vectors": Verdict.RECOMMENDED,
    }


def test_what_fits_nowhere_is_too_big_with_both_numbers() -> None:
    (suggestion,) = suggest(node(16), [model(70, 40)])
    assert suggestion.verdict is Verdict.TOO_BIG
    assert describe_bytes(suggestion.needed_bytes) in suggestion.why
    assert describe_bytes(suggestion.budget_bytes) in suggestion.why
    assert not suggestion.fits_now


def test_a_gpu_that_cannot_be_used_counts_for_nothing() -> None:
    candidates = [model(8, 5)]
    assert suggest(node(8, 24, usable=False), candidates) == suggest(node(8), candidates)


def test_several_gpus_hold_a_model_together() -> None:
    (suggestion,) = suggest(node(32, 12, 12), [model(32, 16)])
    assert suggestion.place == "GPUs 0+1"
    assert suggestion.verdict is Verdict.RECOMMENDED


def test_what_fits_the_machine_but_not_now_says_so() -> None:
    (suggestion,) = suggest(node(32, free=0.1), [model(8, 5)])
    assert suggestion.verdict is Verdict.RECOMMENDED
    assert not suggestion.fits_now
    assert "free now" in suggestion.why


def test_the_whole_memory_is_never_given_away() -> None:
    (suggestion,) = suggest(node(8), [model(8, 6.5)])
    assert suggestion.verdict is Verdict.TOO_BIG, "the system needs some as well"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 MiB"), (98_362_432, "94 MiB"), (GIB, "1.0 GiB"), (int(18.4 * GIB), "18.4 GiB")]
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert describe_bytes(count) == text


CANDIDATES = st.lists(
    st.builds(
        lambda billions, gib, tag, number: model(billions, gib, tag, name=f"m{number}"),
        st.floats(0.1, 200),
        st.floats(0.05, 150),
        st.sampled_from(["chat", "code", "embedding", "other"]),
        st.integers(0, 10**9),
    ),
    max_size=8,
    unique_by=lambda candidate: candidate.family,
)
NODES = st.builds(
    lambda memory, gpus, cores, free: node(memory, *gpus, cores=cores, free=free),
    st.floats(0, 512),
    st.lists(st.floats(0, 141), max_size=4),
    st.integers(0, 128),
    st.floats(0, 1),
)


@given(NODES, CANDIDATES)
def test_every_candidate_is_judged_once_and_soundly(machine: Node, candidates: list[Candidate]) -> None:
    suggestions = suggest(machine, candidates)
    assert sorted(s.candidate.family for s in suggestions) == sorted(c.family for c in candidates)
    order = [list(Verdict).index(s.verdict) for s in suggestions]
    assert order == sorted(order)
    for suggestion in suggestions:
        fits = suggestion.needed_bytes <= suggestion.budget_bytes
        assert fits == (suggestion.verdict is not Verdict.TOO_BIG) == bool(suggestion.place)
        assert suggestion.why
    for purpose in ("chat", "code", "embedding"):
        recommended = [s for s in suggestions if s.verdict is Verdict.RECOMMENDED and purpose in s.candidate.tags]
        assert len(recommended) <= 1
    fitting_chat = [s for s in suggestions if s.place and "chat" in s.candidate.tags]
    if fitting_chat:
        assert any(s.verdict is Verdict.RECOMMENDED for s in fitting_chat)


@given(NODES, CANDIDATES, st.integers(0, 1 << 38))
def test_more_memory_never_makes_a_model_too_big(machine: Node, candidates: list[Candidate], more: int) -> None:
    larger = dataclasses.replace(machine, memory_total_bytes=machine.memory_total_bytes + more)
    before, after = (
        {s.candidate.family for s in suggest(n, candidates) if s.verdict is not Verdict.TOO_BIG}
        for n in (machine, larger)
    )
    assert before <= after
