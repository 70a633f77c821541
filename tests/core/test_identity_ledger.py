"""Join tokens, members and revocations against a simple model, by a manual clock."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chorus.core.errors import (
    NameTakenError,
    NodeTakenError,
    NotFoundError,
    OverloadedError,
    RenewalError,
    RevokedError,
    TokenExpiredError,
    TokenInvalidError,
    TokenNodeError,
    TokenRevokedError,
    TokenUsedError,
)
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.attempts import Attempts
from chorus.core.identity.ledger import JoinToken, Ledger
from chorus.core.identity.renewal import GRACE_S, due_at, pause_s

DOMAIN = "home.internal"
LIFE_S, TTL_S = 86_400.0, 3600.0
NAMES = st.sampled_from(["attic", "desk"])
KEYS = st.sampled_from(["k1", "k2", "k3"])


def runner(name: str) -> SpiffeId:
    return SpiffeId(DOMAIN, Role.RUNNER, name)


def token(token_id: str, now: float, *, name: str = "") -> JoinToken:
    return JoinToken(token_id, token_id.encode() * 8, Role.RUNNER, name, now, now + TTL_S, "admin")


@dataclass
class Leaf:
    name: str
    key: str
    serial: int
    not_after: float
    good: bool = True


class LedgerAgainstModel(RuleBasedStateMachine):
    """The model: which tokens are open, which key owns which name until when, and which leaves are good."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.now = 1_000_000.0
        self.count = 0
        self.open: dict[str, tuple[str, float]] = {}  # token -> its name, its end
        self.used: dict[str, tuple[str, str]] = {}  # token -> key, name
        self.owner: dict[str, tuple[str, float]] = {}  # name -> key, end of its latest certificate
        self.out: set[str] = set()
        self.leaves: list[Leaf] = []

    def _issue(self, name: str, key: str) -> None:
        self.count += 1
        leaf = Leaf(name, key, self.count, self.now + LIFE_S)
        self.leaves.append(leaf)
        self.ledger.issued(
            runner(name), key=key, serial=leaf.serial, not_after=leaf.not_after, addresses=(), now=self.now
        )
        self.owner[name] = (key, leaf.not_after)

    def _join(self, token_id: str, key: str, name: str) -> SpiffeId:
        return self.ledger.redeem(
            token_id, token_id.encode() * 8, key=key, name=name, trust_domain=DOMAIN, now=self.now
        )

    @rule(name=st.one_of(st.just(""), NAMES))
    def create(self, name: str) -> None:
        self.count += 1
        token_id = f"t{self.count}"
        self.ledger.add(token(token_id, self.now, name=name), self.now)
        self.open[token_id] = (name, self.now + TTL_S)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), key=KEYS, said=NAMES)
    def join(self, data: st.DataObject, key: str, said: str) -> None:
        token_id = data.draw(st.sampled_from(sorted(self.open)))
        fixed, end = self.open[token_id]
        name = fixed or said
        owner = self.owner.get(name)
        taken = owner is not None and owner[0] != key and self.now < owner[1] + GRACE_S
        if self.now >= end:
            with pytest.raises(TokenInvalidError) as refused:
                self._join(token_id, key, said)
            known = any(kept.token_id == token_id for kept in self.ledger.tokens)  # for a week
            assert isinstance(refused.value, TokenExpiredError) == known
        elif name in self.out:
            with pytest.raises(RevokedError):
                self._join(token_id, key, said)
        elif taken and not fixed:
            with pytest.raises(NameTakenError):
                self._join(token_id, key, said)
        else:
            assert self._join(token_id, key, said) == runner(name)
            del self.open[token_id]
            self.used[token_id] = (key, name)
            if taken:
                for leaf in self.leaves:
                    leaf.good = leaf.good and leaf.name != name
            self._issue(name, key)

    @precondition(lambda self: self.used)
    @rule(data=st.data(), key=KEYS)
    def join_again(self, data: st.DataObject, key: str) -> None:
        token_id = data.draw(st.sampled_from(sorted(self.used)))
        if not any(known.token_id == token_id for known in self.ledger.tokens):  # forgotten after a week
            with pytest.raises(TokenInvalidError):
                self._join(token_id, key, "other")
            return
        first, name = self.used[token_id]
        if key == first and self.owner.get(name, ("", 0.0))[0] == key:  # nobody has taken its place, or shut it out
            assert self._join(token_id, key, "other") == runner(name)
        else:
            with pytest.raises(TokenUsedError):
                self._join(token_id, key, "other")

    @precondition(lambda self: self.open)
    @rule(data=st.data(), key=KEYS)
    def take_back(self, data: st.DataObject, key: str) -> None:
        token_id = data.draw(st.sampled_from(sorted(self.open)))
        if not any(known.token_id == token_id for known in self.ledger.tokens):
            with pytest.raises(NotFoundError):
                self.ledger.revoke_token(token_id)
        else:
            self.ledger.revoke_token(token_id)
            with pytest.raises(TokenRevokedError):
                self._join(token_id, key, "attic")
        del self.open[token_id]

    @precondition(lambda self: self.leaves)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        leaf = data.draw(st.sampled_from(self.leaves))

        def ask() -> None:
            self.ledger.check_renewal(
                runner(leaf.name), key=leaf.key, serial=leaf.serial, not_after=leaf.not_after, now=self.now
            )

        owner = self.owner.get(leaf.name)
        if leaf.name in self.out:
            with pytest.raises(RevokedError):
                ask()
        elif owner is not None and owner[0] != leaf.key:
            with pytest.raises((RenewalError, RevokedError)):
                ask()
        elif not leaf.good and self.now < leaf.not_after:
            with pytest.raises(RevokedError):
                ask()
        elif self.now > leaf.not_after + GRACE_S:
            with pytest.raises(RenewalError):
                ask()
        elif leaf.good:
            ask()
            self._issue(leaf.name, leaf.key)

    @rule(name=NAMES)
    def revoke(self, name: str) -> None:
        before = self.ledger.revocations.revision
        self.ledger.revoke(runner(name), why="stolen", now=self.now, longest_s=0)
        assert self.ledger.revocations.revision > before
        self.out.add(name)
        self.owner.pop(name, None)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.out)))
        self.ledger.restore_identity(runner(name))
        self.out.discard(name)

    @rule(seconds=st.sampled_from([60.0, TTL_S, LIFE_S, GRACE_S / 2]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        # Entries end once nothing can live that they are about; with them, here, the memory of who was shut out.
        self.out = {name for name in self.out if self.ledger.revocations.of(runner(name), -1) is not None}

    @invariant()
    def living_leaves_are_good_or_revoked_as_they_should_be(self) -> None:
        revocations = self.ledger.revocations
        for leaf in self.leaves:
            if self.now < leaf.not_after:
                shut_out = revocations.of(runner(leaf.name), leaf.serial) is not None
                assert shut_out == (leaf.name in self.out or not leaf.good)

    @invariant()
    def what_is_written_down_is_the_same_again(self) -> None:
        again = Ledger.restore(
            self.ledger.tokens, self.ledger.members, self.ledger.revocations, retired=self.ledger.retired
        )
        assert (again.tokens, again.members, again.revocations) == (
            self.ledger.tokens,
            self.ledger.members,
            self.ledger.revocations,
        )


TestLedger = LedgerAgainstModel.TestCase
TestLedger.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_a_node_is_one_members_until_it_is_gone_unless_the_token_names_it() -> None:
    ledger = Ledger()
    tokens = [JoinToken(f"t{n}", f"t{n}".encode() * 8, Role.RUNNER, "", 0.0, 1e9, "admin") for n in range(3)]
    tokens.append(JoinToken("t3", b"t3" * 8, Role.RUNNER, "", 0.0, 1e9, "admin", node="n1"))
    for made in tokens:
        ledger.add(made, 0.0)

    def join(token_id: str, name: str, now: float) -> None:
        identity = ledger.redeem(
            token_id, token_id.encode() * 8, key=name, name=name, trust_domain=DOMAIN, now=now, node="n1"
        )
        ledger.issued(identity, key=name, serial=1, not_after=now + LIFE_S, addresses=(), now=now, node="n1")

    join("t0", "first", 0.0)
    with pytest.raises(NodeTakenError, match="first has joined from n1"):
        join("t1", "second", LIFE_S + GRACE_S - 1)
    join("t3", "beside", 0.0)
    ledger.revoke(runner("first"), why="", now=0.0, longest_s=0)
    with pytest.raises(NodeTakenError, match="beside"):
        join("t1", "second", 0.0)
    join("t1", "second", LIFE_S + GRACE_S)


def _joins(ledger: Ledger, token_id: str, *, key: str, node: str) -> SpiffeId:
    """Joins as `office.py` does, for a life of LIFE_S from 0."""
    secret = token_id.encode() * 8
    identity = ledger.redeem(token_id, secret, key=key, name="attic", trust_domain=DOMAIN, now=0.0, node=node)
    ledger.issued(identity, key=key, serial=len(ledger.members), not_after=LIFE_S, addresses=(), now=0.0, node=node)
    return identity


def test_a_key_whose_place_was_taken_does_not_come_back_with_a_restored_name() -> None:
    ledger, attic = Ledger(), runner("attic")
    for number in (1, 2, 3):
        ledger.add(JoinToken(f"t{number}", f"t{number}".encode() * 8, Role.RUNNER, "attic", 0.0, 1e9, "admin"), 0.0)
    _joins(ledger, "t1", key="stolen", node="n1")
    _joins(ledger, "t2", key="new", node="n1")
    later = 2 * LIFE_S  # nobody is told any more that its certificate is worth nothing, which has ended
    ledger.revoke(attic, why="", now=later, longest_s=0)
    ledger.restore_identity(attic)
    again = Ledger.restore(ledger.tokens, ledger.members, ledger.revocations, retired=ledger.retired)
    for one in (ledger, again):
        with pytest.raises(RenewalError, match="another machine has joined"):
            one.check_renewal(attic, key="stolen", serial=0, not_after=LIFE_S, now=later)
        one.check_renewal(attic, key="new", serial=1, not_after=LIFE_S, now=later)
    _joins(ledger, "t3", key="stolen", node="n1")  # an admin gave it a token
    ledger.check_renewal(attic, key="stolen", serial=2, not_after=LIFE_S, now=later)


def test_a_token_for_a_node_is_good_nowhere_else() -> None:
    ledger = Ledger()
    ledger.add(JoinToken("t1", b"t1" * 8, Role.RUNNER, "attic", 0.0, 1e9, "admin", node="n1"), 0.0)
    for elsewhere in ("n2", ""):
        with pytest.raises(TokenNodeError, match="node is n1"):
            _joins(ledger, "t1", key="thief", node=elsewhere)
    _joins(ledger, "t1", key="k", node="n1")


def test_asking_again_after_joining_gives_the_same_and_no_other_node() -> None:
    ledger = Ledger()
    ledger.add(JoinToken("t1", b"t1" * 8, Role.RUNNER, "attic", 0.0, 1e9, "admin"), 0.0)
    assert _joins(ledger, "t1", key="k", node="n1") == _joins(ledger, "t1", key="k", node="n1")
    with pytest.raises(TokenUsedError):
        _joins(ledger, "t1", key="k", node="n2")


@pytest.mark.parametrize("lost", ["revoked", "replaced"])
def test_asking_again_brings_nobody_back_who_lost_the_name(lost: str) -> None:
    ledger = Ledger()
    for token_id in ("t1", "t2"):
        ledger.add(JoinToken(token_id, token_id.encode() * 8, Role.RUNNER, "attic", 0.0, 1e9, "admin"), 0.0)
    attic = _joins(ledger, "t1", key="old", node="n1")
    if lost == "revoked":
        ledger.revoke(attic, why="stolen", now=0.0, longest_s=0)
    else:
        _joins(ledger, "t2", key="new", node="n1")
    with pytest.raises(TokenUsedError):
        _joins(ledger, "t1", key="old", node="n1")


def test_a_guessed_secret_is_no_token() -> None:
    ledger = Ledger()
    ledger.add(token("t1", 0.0), 0.0)
    for token_id, secret in (("t1", b"x" * 16), ("t2", b"t1" * 8)):
        with pytest.raises(TokenInvalidError) as refused:
            ledger.redeem(token_id, secret, key="k", name="attic", trust_domain=DOMAIN, now=1.0)
        assert refused.value.reason == "JOIN_TOKEN_INVALID"  # which of the two was wrong is not told


def test_a_token_that_was_used_is_not_taken_back() -> None:
    ledger = Ledger()
    ledger.add(token("t1", 0.0), 0.0)
    ledger.redeem("t1", b"t1" * 8, key="k", name="attic", trust_domain=DOMAIN, now=1.0)
    with pytest.raises(TokenUsedError, match="chorus certs revoke"):
        ledger.revoke_token("t1")


def test_tries_come_back_with_time_and_one_caller_leaves_another_its_own() -> None:
    attempts = Attempts(burst=3, per_s=0.5, shared=2)
    for _ in range(3):
        attempts.take("a", 0.0)
    with pytest.raises(OverloadedError) as refused:
        attempts.take("a", 0.0)
    assert refused.value.retry_after_s == pytest.approx(2.0)
    for _ in range(3):
        attempts.take("b", 0.0)
    with pytest.raises(OverloadedError):
        attempts.take("c", 0.0)  # all together have six
    attempts.take("a", 2.0)


def test_a_flood_of_callers_is_not_remembered_without_bound() -> None:
    attempts = Attempts(burst=1, per_s=1.0, shared=1000, most=10)
    for number in range(500):
        attempts.take(str(number), 0.0)
    assert len(attempts._callers) == 10


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
def test_a_leaf_is_renewed_at_about_two_thirds_of_its_life(jitter: float) -> None:
    assert 0.6 <= due_at(0.0, 1.0, jitter) <= 0.667


def test_tries_after_a_failure_spread_and_leave_time_for_more() -> None:
    pauses = [pause_s(failures, 1e9, 0.5) for failures in range(1, 12)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 60.0
    assert pause_s(10, 20.0, 0.5) == 4.0
    assert pause_s(10, -5.0, 0.5) == 60.0
