"""Listing nodes: filters, grouping and pages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import InvalidRequestError
from chorus.core.fleet.events import LeasedRecord
from chorus.core.fleet.listing import NodeFilter, NodePage, list_nodes
from chorus.core.fleet.records import Feature, RunnerState, Tier
from tests.core.fleet_records import model, node, record

ATTIC = LeasedRecord(
    record(
        "attic-1",
        machine=node("attic", labels={"room": "attic"}),
        models=(
            model("a.Q4.gguf", "a", features="chat tools"),
            model("e.gguf", "e", features="embed", tier=Tier.SMALL),
        ),
        labels={"owner": "kim"},
    )
)
CELLAR = LeasedRecord(record("cellar-1", machine=node("cellar"), state=RunnerState.DRAINING))


@pytest.mark.parametrize(
    ("condition", "matches"),
    [
        (NodeFilter(), True),
        (NodeFilter(node_id="attic"), True),
        (NodeFilter(node_id="att"), False),
        (NodeFilter(state=RunnerState.READY), True),
        (NodeFilter(state=RunnerState.DRAINING), False),
        (NodeFilter(labels={"room": "attic", "owner": "kim"}), True),
        (NodeFilter(labels={"room": "cellar"}), False),
        (NodeFilter(labels={"floor": ""}), False),
        (NodeFilter(model="a"), True),
        (NodeFilter(model="a.Q4.gguf"), True),
        (NodeFilter(model="a.Q8.gguf"), False),
        (NodeFilter(features=frozenset({Feature.CHAT, Feature.TOOLS})), True),
        (NodeFilter(features=frozenset({Feature.CHAT, Feature.EMBED})), False),
        (NodeFilter(tier=Tier.SMALL), True),
        (NodeFilter(tier=Tier.LARGE), False),
        (NodeFilter(model="a", tier=Tier.SMALL), False),
    ],
)
def test_all_conditions_must_hold_and_those_on_models_for_one_model(condition: NodeFilter, matches: bool) -> None:
    assert condition.matches(ATTIC.record) is matches


def test_a_node_without_a_matching_runner_is_left_out() -> None:
    page = list_nodes([ATTIC, CELLAR], condition=NodeFilter(state=RunnerState.READY))
    assert [entry.node.node_id for entry in page.nodes] == ["attic"]


def test_runners_share_their_node_and_the_one_heard_last_describes_it() -> None:
    older = LeasedRecord(record("r1", machine=node(memory_available_bytes=1)), lease_age_s=1.0)
    newer = LeasedRecord(record("r2", machine=node(memory_available_bytes=2)), lease_age_s=0.1)
    (entry,) = list_nodes([newer, older]).nodes
    assert entry.node.memory_available_bytes == 2
    assert [leased.record.runner.runner_id for leased in entry.runners] == ["r1", "r2"]


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=5), st.text(min_size=1, max_size=3)), max_size=20),
    st.integers(1, 5),
)
def test_pages_hold_every_node_once_in_order(pairs: list[tuple[str, str]], page_size: int) -> None:
    runners = [LeasedRecord(record(runner, machine=node(where))) for where, runner in pairs]
    listed: list[str] = []
    page = NodePage((), "")
    for _ in range(len(pairs) + 1):
        page = list_nodes(runners, page_size=page_size, page_token=page.next_page_token)
        assert len(page.nodes) <= page_size
        listed += [entry.node.node_id for entry in page.nodes]
        if not page.next_page_token:
            break
    assert listed == sorted({where for where, _ in pairs})


def test_a_page_goes_on_after_the_last_node_even_if_that_one_left() -> None:
    runners = [LeasedRecord(record(name, machine=node(name))) for name in "abcd"]
    first = list_nodes(runners, page_size=2)
    second = list_nodes([runners[0], runners[2], runners[3]], page_size=2, page_token=first.next_page_token)
    assert [entry.node.node_id for entry in second.nodes] == ["c", "d"]
    assert second.next_page_token == ""


def test_a_hundred_nodes_a_page_unless_asked_otherwise() -> None:
    runners = [LeasedRecord(record(f"r{number:03}", machine=node(f"n{number:03}"))) for number in range(101)]
    assert len(list_nodes(runners).nodes) == 100
    assert len(list_nodes(runners, page_size=1000).nodes) == 101


@pytest.mark.parametrize("size", [-1, 1001])
def test_a_page_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(InvalidRequestError, match="page_size"):
        list_nodes([ATTIC], page_size=size)


@given(st.text(min_size=1) | st.binary(min_size=1).map(lambda raw: raw.hex()))
def test_a_token_that_is_not_from_here_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequestError, match="page_token"):
        list_nodes([ATTIC], page_token=token)


def test_a_token_with_something_appended_is_refused() -> None:
    token = list_nodes([ATTIC, CELLAR], page_size=1).next_page_token
    for forged in (token + "A", token[:-1], token + "=", " " + token):
        with pytest.raises(InvalidRequestError, match="page_token"):
            list_nodes([ATTIC], page_token=forged)
