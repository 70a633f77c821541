"""Who is believed to be on which node: the rule by itself, and over sequences of registrations."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.errors import PermissionDeniedError, UnknownLeaseError
from chorus.core.fleet import leases as leases_module
from chorus.core.fleet.claims import Claim, NodeClaims, check_claim
from chorus.core.fleet.leases import LeaseTable
from chorus.core.fleet.records import Load, RunnerRecord
from tests.core.fleet_records import READY, node, record

HERE, THERE = "10.0.0.1", "10.0.0.2"
NODES, HOSTS = ("n1", "n2"), (HERE, THERE)


def on(runner_id: str, node_id: str, incarnation: int = 1) -> RunnerRecord:
    return record(runner_id, incarnation, machine=node(node_id))


def named(node_id: str, host: str = HERE) -> Claim:
    return Claim(frozenset({node_id}), host)


def table(rule: NodeClaims = NodeClaims.FIRST) -> LeaseTable:
    return LeaseTable(epoch=1, ttl_s=2.0, now=0.0, claims=rule)


@pytest.mark.parametrize("rule", NodeClaims)
def test_a_certificate_that_names_a_node_is_for_no_other(rule: NodeClaims) -> None:
    leases = table(rule)
    leases.register(on("r", "n1"), 0.0, named("n1"))
    with pytest.raises(PermissionDeniedError, match="n1, not for 'n2'"):
        leases.register(on("r", "n2", 2), 0.0, named("n1"))
    assert leases.leased_record("r", 0.0).record.node.node_id == "n1"


@pytest.mark.parametrize("rule", [NodeClaims.FIRST, NodeClaims.ANY])
def test_one_that_names_none_takes_no_node_from_one_that_does(rule: NodeClaims) -> None:
    leases = table(rule)
    leases.register(on("r", "n1"), 0.0, named("n1"))
    with pytest.raises(PermissionDeniedError, match="another machine is n1"):
        leases.register(on("thief", "n1"), 0.0, Claim(host=THERE))
    leases.register(on("second", "n1"), 0.0, Claim(host=HERE))  # a version before, on the same machine


def test_who_squats_on_a_node_is_out_once_its_owner_comes() -> None:
    leases = table()
    leases.register(on("thief", "n1"), 0.0, Claim(host=THERE))
    leases.register(on("r", "n1"), 0.1, named("n1"))
    with pytest.raises(UnknownLeaseError):
        leases.heartbeat("thief", 1, 2, READY, Load(), 0.1)
    assert [removal.runner_id for removal in leases.expire(0.2)] == ["thief"]
    with pytest.raises(PermissionDeniedError):
        leases.register(on("thief", "n1"), 0.2, Claim(host=THERE))


def test_without_names_the_first_machine_has_the_node_for_as_long_as_it_lives() -> None:
    leases = table()
    leases.register(on("a", "n1"), 0.0, Claim(host=HERE))
    leases.register(on("b", "n1"), 0.0, Claim(host=HERE))
    with pytest.raises(PermissionDeniedError, match="copies"):
        leases.register(on("c", "n1"), 0.0, Claim(host=THERE))
    leases.deregister("a", None)
    leases.deregister("b", None)
    leases.register(on("c", "n1"), 0.0, Claim(host=THERE))


def test_without_a_name_a_runner_stays_where_it_was_first_also_while_it_is_away() -> None:
    leases = table()
    leases.register(on("a", "n1"), 0.0, Claim(host=HERE))
    leases.deregister("a", None)
    with pytest.raises(PermissionDeniedError, match="was on n1"):
        leases.register(on("a", "n2", 2), 0.0, Claim(host=HERE))
    leases.register(on("a", "n2", 3), 0.0, named("n2"))  # its new certificate says so
    with pytest.raises(PermissionDeniedError, match="was on n2"):
        leases.register(on("a", "n1", 4), 0.0, Claim(host=HERE))  # its old one, stolen


def test_without_a_name_nobody_takes_the_node_of_one_that_has_proved_it_and_is_away() -> None:
    leases = table()
    leases.register(on("r", "n1"), 0.0, named("n1"))
    leases.deregister("r", None)
    with pytest.raises(PermissionDeniedError, match="another machine is n1"):
        leases.register(on("thief", "n1"), 0.0, Claim(host=THERE))
    leases.register(on("r", "n1", 2), 0.0, named("n1", THERE))  # it has another address now


def test_what_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "_REMEMBERED_MAX", 3)
    leases = table()
    for number in range(9):
        leases.register(on(f"r{number}", f"n{number}"), 0.0, named(f"n{number}"))
        leases.validate_state()


def test_a_registry_may_ask_for_names_or_for_nothing() -> None:
    others = [Claim(host=HERE)]
    with pytest.raises(PermissionDeniedError, match=r"registry\.node_claims"):
        check_claim("r", "n1", Claim(host=HERE), [], NodeClaims.CERTIFICATE)
    check_claim("r", "n1", Claim(host=THERE), others, NodeClaims.ANY)


CLAIMS = st.builds(
    Claim, st.sampled_from([frozenset[str](), frozenset({"n1"}), frozenset({"n2"})]), st.sampled_from(HOSTS)
)
STEPS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(NODES), CLAIMS, st.sampled_from([*"abc", ""])), max_size=12
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_whatever_is_said_nobody_is_where_a_certificate_says_that_another_is(
    steps: list[tuple[str, str, Claim, str]],
) -> None:
    """Each step is a registration, after which a runner may leave."""
    leases, claims = table(), dict[str, Claim]()
    homes, proven = dict[str, str](), dict[str, tuple[str, Claim]]()
    for number, (runner_id, node_id, claim, leaving) in enumerate(steps, start=1):
        try:
            leases.register(on(runner_id, node_id, number), 0.0, claim)
        except PermissionDeniedError:
            assert not claim.proves(node_id), "a certificate is always believed"
        else:
            claims[runner_id] = claim
            if claim.proves(node_id):
                proven[node_id] = (runner_id, claim)
            else:
                assert homes.get(runner_id, node_id) == node_id, "it has moved without a certificate that says so"
                owner, proof = proven.get(node_id, (runner_id, claim))
                assert owner == runner_id or proof.host == claim.host, "somebody else has proved to be there"
            homes[runner_id] = node_id
        leases.deregister(leaving, None)
        leases.validate_state()
        leases.expire(0.0)
        by_node: dict[str, list[Claim]] = {}
        for leased in leases.leased(0.0):
            by_node.setdefault(leased.record.node.node_id, []).append(claims[leased.record.runner.runner_id])
        for where, there in by_node.items():
            unproven = [claim for claim in there if not claim.proves(where)]
            assert not any(claim.nodes for claim in unproven)
            assert len({claim.host for claim in unproven}) <= 1
            proving = {claim.host for claim in there if claim.proves(where)}
            assert not unproven or proving <= {unproven[0].host}
