"""The books of direct mode against a simple model: every grant is closed once, whatever clients and runners do."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chorus.core.admission.grants import HOLD_S, LOST_S, Closed, Closing, Grants, RunnerLife
from chorus.core.identity.tickets import TicketUse

LIVES: list[RunnerLife] = [("r1", 1), ("r1", 2), ("r2", 1)]
TTL_S = 10.0


class BooksAgainstModel(RuleBasedStateMachine):
    """`held` is the ticket's id."""

    def __init__(self) -> None:
        super().__init__()
        self.grants: Grants[str] = Grants()
        self.now = 0.0
        self.number = 0
        self.open: dict[str, tuple[RunnerLife, str, float]] = {}
        self.begun: set[str] = set()
        self.due: dict[str, float] = {}
        self.placeless: set[str] = set()
        self.closed: dict[str, Closing] = {}
        self.returned: dict[str, tuple[RunnerLife, str, float]] = {}  # whose tickets may be good still
        self.deaf: dict[RunnerLife, float] = {}

    def take(self, closed: Iterable[Closed[str]]) -> list[str]:
        keys = []
        for one in closed:
            assert one.held in self.open, "it was closed twice, or never granted"
            del self.open[one.held]
            self.placeless.discard(one.held)
            self.closed[one.held] = one.closing
            keys.append(one.held)
        return keys

    def come_late(self, late: list[str], told: set[str]) -> None:
        """Of those told, the ones without a place are said to come late, once."""
        assert sorted(late) == sorted(told & self.placeless - self.begun)
        self.placeless -= told

    @rule(life=st.sampled_from(LIVES), caller=st.sampled_from("xy"))
    def grant(self, life: RunnerLife, caller: str) -> None:
        if life in self.deaf:  # nothing is granted on a runner that can't tell
            return
        self.number += 1
        key = f"t{self.number}"
        self.grants.grant(key, caller, life, key, now=self.now, lapses_at=self.now + TTL_S)
        self.due[key] = self.now + HOLD_S
        self.open[key] = (life, caller, self.now + TTL_S)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), ended=st.booleans(), life=st.sampled_from(LIVES))
    def a_runner_tells(self, data: st.DataObject, ended: bool, life: RunnerLife) -> None:
        key = data.draw(st.sampled_from(sorted(self.open)))
        mine = self.open[key][0] == life
        self.deaf.pop(life, None)
        told = self.grants.told(life, [TicketUse(key, ended=ended)])
        self.come_late(told.late, {key} if mine else set())
        assert self.take(told.closed) == ([key] if mine and ended else [])
        if mine and not ended:
            self.begun.add(key)

    @rule(life=st.sampled_from(LIVES), data=st.data())
    def a_runner_tells_all(self, life: RunnerLife, data: st.DataObject) -> None:
        mine = [key for key, (of, _, _) in self.open.items() if of == life]
        told = [key for key in mine if data.draw(st.booleans())]
        self.deaf.pop(life, None)
        word = self.grants.told(life, [TicketUse(key) for key in told], whole=True)
        self.come_late(word.late, set(told))
        closed = self.take(word.closed)
        assert sorted(closed) == sorted(key for key in mine if key in self.begun and key not in told)
        self.begun |= set(told)

    @rule(life=st.sampled_from(LIVES))
    def the_connection_breaks(self, life: RunnerLife) -> None:
        self.grants.unheard(life, self.now)
        if any(of == life for of, _, _ in self.open.values()):
            self.deaf.setdefault(life, self.now)

    @rule(life=st.sampled_from(LIVES))
    def a_runner_is_gone(self, life: RunnerLife) -> None:
        self.deaf.pop(life, None)
        self.returned = {key: grant for key, grant in self.returned.items() if grant[0] != life}
        closed = self.take(self.grants.gone(life))
        for key in closed:
            assert self.closed[key] is (Closing.LOST if key in self.begun else Closing.UNUSED)
        assert all(of != life for of, _, _ in self.open.values())

    @precondition(lambda self: self.open)
    @rule(data=st.data(), caller=st.sampled_from("xy"))
    def give_back(self, data: st.DataObject, caller: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.open)))
        grant = self.open[key]
        may = grant[1] == caller and key not in self.begun
        assert self.take(self.grants.returned(key, caller)) == ([key] if may else [])
        if may:
            self.returned[key] = grant

    @precondition(lambda self: self.returned)
    @rule(data=st.data(), ended=st.booleans(), life=st.sampled_from(LIVES))
    def one_that_was_given_back_is_used_all_the_same(self, data: st.DataObject, ended: bool, life: RunnerLife) -> None:
        key = data.draw(st.sampled_from(sorted(self.returned)))
        mine = self.returned[key][0] == life
        self.deaf.pop(life, None)
        told = self.grants.told(life, [TicketUse(key, ended=ended)])
        assert told.late == ([key] if mine else [])
        if mine:
            self.open[key] = self.returned.pop(key)
        assert self.take(told.closed) == ([key] if mine and ended else [])
        if mine and not ended:
            self.begun.add(key)

    @rule(seconds=st.floats(0.0, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        before = dict(self.open)
        overdue = self.grants.overdue(self.now)
        expected = {
            key
            for key, (life, _, _) in before.items()
            if self.now >= self.due[key] and key not in self.begun | self.placeless and life not in self.deaf
        }
        assert sorted(overdue) == sorted(expected)
        self.placeless |= expected
        closed = set(self.take(self.grants.sweep(self.now)))
        self.returned = {key: grant for key, grant in self.returned.items() if self.now < grant[2]}
        for key, (life, _, lapses_at) in before.items():
            lost = life in self.deaf and self.now >= self.deaf[life] + LOST_S
            if key in self.begun:
                assert (key in closed) is lost
            else:
                assert (key in closed) is (self.now >= lapses_at and (life not in self.deaf or lost))
        self.deaf = {life: at for life, at in self.deaf.items() if any(of == life for of, _, _ in self.open.values())}

    @invariant()
    def the_books_agree(self) -> None:
        assert len(self.grants) == len(self.open)

    def teardown(self) -> None:
        """Without a word of anybody's, everything lapses in the end but what runs on runners that can be heard."""
        for life in LIVES:
            self.grants.unheard(life, self.now)
        self.take(self.grants.sweep(self.now + TTL_S + LOST_S + 1.0))
        assert not self.open
        assert len(self.grants) == 0


TestBooks = BooksAgainstModel.TestCase
