"""The cost ledger: a budget that several coordinators share, crashes, sums, and what is kept."""

from __future__ import annotations

import sqlite3
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from chorus.core.costs import Entry, Grouping, Limits, Line, Where
from chorus.core.costs.budget import DAY_S, day_of, month_of, name_of
from chorus.store.ledger import LedgerFile, Reservation

# The last day of a month, so that both a day and a month end soon.
START = 31 * DAY_S - 3600.0
LASTS_S = 5000.0
AMOUNTS = st.integers(0, 60)
COORDINATORS = ("one", "two")


@dataclass
class Kept:
    """A reservation as the model has it."""

    owner: str
    day: int
    amount: int
    lapses: float


@dataclass
class Model:
    """What should be in the file. `over` is by how much requests of a day cost more than was reserved for them."""

    reserved: dict[str, Kept] = field(default_factory=dict)
    spent: dict[int, int] = field(default_factory=dict)
    over: dict[int, int] = field(default_factory=dict)

    def charge(self, gone: list[str]) -> None:
        for name in gone:
            kept = self.reserved.pop(name)
            self.spent[kept.day] = self.spent.get(kept.day, 0) + kept.amount

    def books(self, day: int) -> tuple[int, int, int, int]:
        def of(days: range) -> tuple[int, int]:
            reserved = sum(kept.amount for kept in self.reserved.values() if kept.day in days)
            return sum(self.spent.get(one, 0) for one in days), reserved

        return *of(range(day, day + 1)), *of(range(month_of(day), day + 1))


class BudgetOfSeveral(RuleBasedStateMachine):
    """Two coordinators, which are killed and started anew, share a file and a budget, day after day."""

    asked = Bundle("asked")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.model = Model()
        self.now = START
        self.count = 0

    @initialize(day=st.none() | st.integers(0, 150), month=st.none() | st.integers(0, 250))
    def begin(self, day: int | None, month: int | None) -> None:
        self.limits = Limits(day, month)
        self.files = {name: self.opened(name) for name in COORDINATORS}

    def opened(self, name: str) -> LedgerFile:
        return LedgerFile(Path(self.folder.name) / "costs.db", owner=name, keep_days=400, max_requests=10, now=self.now)

    def lapse(self) -> None:
        self.model.charge([name for name, kept in self.model.reserved.items() if kept.lapses <= self.now])

    @rule(target=asked, who=st.sampled_from(COORDINATORS), amount=AMOUNTS)
    def reserve(self, who: str, amount: int) -> str:
        self.count += 1
        name = f"request {self.count}"
        reservation = Reservation(name, "ann", "gpt", amount, self.now + LASTS_S)
        books, lack = self.files[who].reserve(reservation, self.limits, self.now)
        self.lapse()
        spent_today, reserved_today, spent, reserved = self.model.books(day_of(self.now))
        fits = (self.limits.day is None or spent_today + reserved_today + amount <= self.limits.day) and (
            self.limits.month is None or spent + reserved + amount <= self.limits.month
        )
        assert (lack is None) == fits
        if fits:
            self.model.reserved[name] = Kept(who, day_of(self.now), amount, self.now + LASTS_S)
        assert self.told(books) == self.model.books(day_of(self.now))
        return name

    @rule(who=st.sampled_from(COORDINATORS), name=consumes(asked), cost=AMOUNTS)
    def settle(self, who: str, name: str, cost: int) -> None:
        self.files[who].settle(name, cost, self.now)
        kept = self.model.reserved.pop(name, None)
        if kept is not None:
            self.model.spent[kept.day] = self.model.spent.get(kept.day, 0) + cost
            self.model.over[kept.day] = self.model.over.get(kept.day, 0) + max(0, cost - kept.amount)

    @rule(who=st.sampled_from(COORDINATORS))
    def kill_and_start(self, who: str) -> None:
        # Nothing is written at its end: as far as the file goes, closing it is a kill.
        self.files[who].close()
        self.files[who] = self.opened(who)
        self.model.charge([name for name, kept in self.model.reserved.items() if kept.owner == who])
        self.lapse()

    @rule(seconds=st.floats(1, 40_000))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @staticmethod
    def told(books: object) -> tuple[int, ...]:
        return tuple(
            getattr(books, name)
            for name in ("spent_today", "reserved_today", "spent_this_month", "reserved_this_month")
        )

    @invariant()
    def never_more_than_the_limits_and_what_requests_cost_beyond_their_reservations(self) -> None:
        if not hasattr(self, "files"):
            return
        months: dict[int, int] = {}
        for day, spent in self.model.spent.items():
            over = self.model.over.get(day, 0)
            assert self.limits.day is None or spent <= self.limits.day + over
            months[month_of(day)] = months.get(month_of(day), 0) + spent - over
        assert self.limits.month is None or all(spent <= self.limits.month for spent in months.values())

    @invariant()
    def both_see_the_same(self) -> None:
        if not hasattr(self, "files"):
            return
        seen = [self.told(file.books(self.now)) for file in self.files.values()]
        self.lapse()
        assert seen == [self.model.books(day_of(self.now))] * 2
        lines = self.files["one"].lines(Grouping.DAY, since=0)
        assert {line.name: line.spent for line in lines} == {
            name_of(day): spent for day, spent in self.model.spent.items() if spent
        }

    def teardown(self) -> None:
        for file in getattr(self, "files", {}).values():
            file.close()
        self.folder.cleanup()


TestBudgetOfSeveral = BudgetOfSeveral.TestCase
TestBudgetOfSeveral.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)


def entry(
    at: float, *, caller: str = "ann", model: str = "llama", where: Where = Where.LOCAL, avoided: int = 5
) -> Entry:
    return Entry(at, f"request at {at}", caller, model, where, True, 10, 20, 0, avoided)


def ledger(path: Path | None, *, max_requests: int = 100, keep_days: int = 62) -> LedgerFile:
    return LedgerFile(path, owner="one", keep_days=keep_days, max_requests=max_requests, now=START)


def test_sums_by_day_month_model_and_caller() -> None:
    file = ledger(None)
    tomorrow = START + DAY_S
    file.note([entry(START), entry(START, caller="bob", where=Where.CACHED), entry(tomorrow, model="gpt")])
    file.note([entry(START)])
    file.reserve(Reservation("paid", "bob", "gpt", 700, tomorrow), Limits(), START)
    file.settle("paid", 300, START)
    january = Line("1970-01-31", local=2, cached=1, prompt_tokens=30, output_tokens=60, spent=300, avoided=15)
    february = Line("1970-02-01", local=1, prompt_tokens=10, output_tokens=20, avoided=5)
    assert file.lines(Grouping.DAY, since=0) == (february, january)
    assert [line.name for line in file.lines(Grouping.MONTH, since=0)] == ["1970-02", "1970-01"]
    assert file.lines(Grouping.DAY, since=day_of(tomorrow)) == (february,)
    by_model = file.lines(Grouping.MODEL, since=0)
    assert [(line.name, line.requests, line.spent) for line in by_model] == [("gpt", 1, 300), ("llama", 3, 0)]
    (bobs,) = file.lines(Grouping.CALLER, since=0, caller="bob")
    assert (bobs.name, bobs.cached, bobs.spent, bobs.kept_local) == ("bob", 1, 300, 1.0)
    assert Line.total(by_model) == Line.total(file.lines(Grouping.CALLER, since=0))
    assert [one.caller for one in file.latest(3)] == ["ann", "ann", "bob"]
    assert len(file.latest(9, caller="bob")) == 1


def test_single_requests_and_old_days_make_room(tmp_path: Path) -> None:
    file = ledger(tmp_path / "costs.db", max_requests=50)
    file.note([entry(START + number) for number in range(120)])
    assert len(file.latest(1000)) == 49
    assert file.latest(1)[0].at == START + 119
    file.note([entry(START + 63 * DAY_S)])
    assert [line.name for line in file.lines(Grouping.DAY, since=0)] == [name_of(day_of(START) + 63)]
    assert len(file.latest(1000)) == 50, "requests are bounded by their number alone"


def test_a_file_that_is_no_ledger_is_left_as_it_is(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"no database" * 500)
    with pytest.raises(OSError, match="damaged"):
        ledger(damaged)
    assert damaged.read_bytes() == b"no database" * 500
    newer = tmp_path / "newer.db"
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(OSError, match="another version"):
        ledger(newer)
    with pytest.raises(OSError, match="missing"):
        ledger(damaged / "missing" / "costs.db")


def test_a_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "costs.db"
    ledger(path).close()
    assert path.stat().st_mode & 0o077 == 0
