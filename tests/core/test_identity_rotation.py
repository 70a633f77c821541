"""An authority takes over while members come, sleep and renew: nobody is ever shown what he can't check."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.ledger import Member
from chorus.core.identity.renewal import GRACE_S
from chorus.core.identity.rotation import Phase, Rotation, is_due, waits_for

LIFE_S = 86_400.0
NAMES = st.sampled_from(["attic", "desk", "cellar"])


@dataclass
class Holder:
    """A member as it sees itself: who signed its certificate, and whom it believes."""

    issuer: int
    believes: set[int]
    member: Member


class World(RuleBasedStateMachine):
    """Authorities are numbers. `old` is whom the identity service itself shows: who was away checks that."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1e9
        self.old = self.signs = 0
        self.rotation: Rotation | None = None
        self.holders: dict[str, Holder] = {}
        self.finished = 0

    def _issue(self, name: str) -> None:
        identity = SpiffeId("home.internal", Role.RUNNER, name)
        both = {self.old, self.signs, self.old + (self.rotation is not None)}
        member = Member(identity, name, self.now, self.now, (), {1: self.now + LIFE_S})
        self.holders[name] = Holder(self.signs, both, member)

    @rule(name=NAMES)
    def join(self, name: str) -> None:
        self._issue(name)

    @rule(name=NAMES)
    def renew(self, name: str) -> None:
        holder = self.holders.get(name)
        if holder is None or self.now > holder.member.not_after + GRACE_S:
            return
        assert self.old in holder.believes, "it can't check whom it renews at"
        assert holder.issuer in {self.old, self.signs}, "its certificate is worth nothing any more"
        self._issue(name)

    @precondition(lambda self: self.rotation is None)
    @rule()
    def begin(self) -> None:
        self.rotation = Rotation(self.now)

    @rule()
    def advance(self) -> None:
        members = [holder.member for holder in self.holders.values()]
        rotation = self.rotation
        if rotation is None or not is_due(rotation, members, self.now, life_s=LIFE_S):
            return
        assert not waits_for(rotation, members, self.now)
        if rotation.phase is Phase.SPREADING:
            self.signs, self.rotation = self.old + 1, replace(rotation, switched_at=self.now)
        else:
            self.old, self.rotation = self.signs, None
            self.finished += 1

    @rule(seconds=st.sampled_from([LIFE_S / 3, LIFE_S, GRACE_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def all_who_live_believe_each_other(self) -> None:
        living = [holder for holder in self.holders.values() if self.now < holder.member.not_after]
        for one in living:
            for other in living:
                assert other.issuer in one.believes

    def teardown(self) -> None:
        """Whoever is away for good, it comes to its end."""
        self.now += 2 * (LIFE_S + GRACE_S)
        while self.rotation is not None:
            self.advance()
            self.now += LIFE_S


TestRotation = World.TestCase
TestRotation.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
