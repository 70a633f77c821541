"""Tickets of direct mode: each reason to refuse one, and the ledger that takes each once, against a simple model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chorus.core import errors
from chorus.core.errors import TicketError
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.tickets import LEEWAY_S, Ticket, TicketLedger, TicketUse, check_ticket

DOMAIN = "test.chorus.local"
COORDINATOR = SpiffeId(DOMAIN, Role.COORDINATOR, "c1")
CALLER = SpiffeId(DOMAIN, Role.CLIENT, "kim")
TICKET = Ticket("t1", str(CALLER), "r1", 7, b"digest", "model.gguf", 100, expires_at=1000.0)


def check(ticket: Ticket = TICKET, grantor: SpiffeId = COORDINATOR, **other: Any) -> None:
    facts = {"caller": CALLER, "runner_id": "r1", "incarnation": 7, "spec_sha256": b"digest", "now": 999.0, **other}
    check_ticket(ticket, grantor, **facts)


def test_one_in_order_is_good_until_the_clocks_leeway_is_over() -> None:
    check()
    check(now=1000.0 + LEEWAY_S)


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"caller": SpiffeId(DOMAIN, Role.CLIENT, "eve")}, errors.TicketCallerError),
        ({"runner_id": "r2"}, errors.TicketRunnerError),
        ({"incarnation": 8}, errors.TicketRunnerError),
        ({"spec_sha256": b"another"}, errors.TicketRequestError),
        ({"now": 1000.1 + LEEWAY_S}, errors.TicketExpiredError),
        ({"grantor": SpiffeId(DOMAIN, Role.RUNNER, "r1")}, errors.TicketGrantorError),
        ({"grantor": CALLER}, errors.TicketGrantorError),
    ],
)
def test_each_thing_that_is_wrong_has_its_own_reason(changed: dict[str, Any], kind: type[TicketError]) -> None:
    with pytest.raises(kind) as caught:
        check(**changed)
    assert type(caught.value) is kind


class LedgerAgainstModel(RuleBasedStateMachine):
    """However clocks run, no ticket is taken twice; what is remembered is bounded; grantors hear of their own alone."""

    MOST = 5
    KEPT_S = 60.0

    def __init__(self) -> None:
        super().__init__()
        self.ledger = TicketLedger(most=self.MOST, kept_s=self.KEPT_S)
        self.now = 1000.0
        self.number = 0
        self.granted: list[tuple[Ticket, str]] = []
        self.taken: set[str] = set()
        self.running: dict[str, tuple[TicketUse, str]] = {}
        self.ended: dict[str, float] = {}

    @rule(seconds=st.one_of(st.floats(0.0, 100.0), st.floats(-200.0, 0.0)))
    def time_passes_or_the_clock_is_put_back(self, seconds: float) -> None:
        self.now += seconds

    @rule(grantor=st.sampled_from("ab"), ttl_s=st.floats(1.0, 30.0))
    def grant(self, grantor: str, ttl_s: float) -> None:
        self.number += 1
        self.granted.append((replace(TICKET, ticket_id=f"t{self.number}", expires_at=self.now + ttl_s), grantor))

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def redeem(self, data: st.DataObject) -> None:
        ticket, grantor = data.draw(st.sampled_from(self.granted))
        try:
            use = self.ledger.redeem(ticket, grantor, self.now)
        except errors.TicketUsedError:
            assert ticket.ticket_id in self.taken
        except errors.OverloadedError:
            assert len(self.ledger) == self.MOST
        except errors.TicketExpiredError:
            assert self.ended, "nothing was forgotten"
        else:
            assert use == TicketUse(ticket.ticket_id)
            assert ticket.ticket_id not in self.taken or ticket.expires_at + LEEWAY_S < self.now
            self.taken.add(ticket.ticket_id)
            self.running[ticket.ticket_id] = (use, grantor)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=st.integers(0, 9))
    def end(self, data: st.DataObject, tokens: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        use, grantor = self.running.pop(key)
        told = replace(use, ended=True, output_tokens=tokens)
        assert self.ledger.ended(told, self.now) == grantor
        self.ended[key] = self.now
        assert self.ledger.uses(grantor)[key] == told

    @invariant()
    def what_runs_is_remembered(self) -> None:
        for key, (use, grantor) in self.running.items():
            assert self.ledger.uses(grantor)[key] == use
            assert key not in self.ledger.uses("a" if grantor == "b" else "b")

    @invariant()
    def it_is_bounded(self) -> None:
        assert len(self.ledger) <= self.MOST


TestLedger = LedgerAgainstModel.TestCase


def test_a_ticket_that_was_forgotten_is_not_taken_again_when_the_clock_goes_back() -> None:
    ledger = TicketLedger(kept_s=10.0)
    ledger.redeem(TICKET, "c", 999.0)
    ledger.ended(TicketUse("t1", ended=True), 999.0)
    ledger.redeem(replace(TICKET, ticket_id="t2", expires_at=3000.0), "c", 2000.0)
    with pytest.raises(errors.TicketExpiredError):
        ledger.redeem(TICKET, "c", 999.0)
