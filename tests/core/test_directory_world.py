"""A small world of registries, runners and a coordinator in which everything breaks, without a network or a clock.

Whatever happens, nobody who lives is lost, and once everything is mended the directory is the truth.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chorus.core.errors import UnknownLeaseError
from chorus.core.fleet.directory import DirectoryMerger
from chorus.core.fleet.leases import LeaseTable, Watcher
from chorus.core.fleet.records import Load
from tests.core.fleet_records import READY, record

TTL = 2.0
LINGER = 10.0
STEP = 0.25
RUNNERS = st.sampled_from(["x", "y", "z"])
REGISTRIES = st.sampled_from(["a", "b"])


class World(RuleBasedStateMachine):
    """Two registries, three runners, one coordinator. A quarter of a second passes at a time."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.epoch = 0
        self.tables: dict[str, LeaseTable | None] = {"a": None, "b": None}
        self.watchers: dict[str, Watcher | None] = {"a": None, "b": None}
        self.living: dict[str, int] = {}  # runner id -> incarnation
        self.incarnations = dict.fromkeys("xyz", 0)
        self.sequences = dict.fromkeys("xyz", 0)
        self.cut: set[tuple[str, str]] = set()  # (runner, registry) that can't hear each other
        self.merger = DirectoryMerger(linger_s=LINGER)
        for registry in "ab":
            self.start_registry(registry)
            self.connect(registry)

    # --- what can happen --------------------------------------------------------------------------------------------

    @rule(registry=REGISTRIES)
    def start_registry(self, registry: str) -> None:
        """Starts it, or starts it anew: it forgets everything."""
        self.disconnect(registry)
        self.epoch += 1
        self.tables[registry] = LeaseTable(epoch=self.epoch, ttl_s=TTL, now=self.now)

    @rule(registry=REGISTRIES)
    def kill_registry(self, registry: str) -> None:
        self.disconnect(registry)
        self.tables[registry] = None

    @rule(registry=REGISTRIES)
    def connect(self, registry: str) -> None:
        table = self.tables[registry]
        if table is not None and self.watchers[registry] is None:
            self.watchers[registry] = table.watch()
            self.flush(registry)

    @rule(registry=REGISTRIES)
    def disconnect(self, registry: str) -> None:
        watcher, table = self.watchers[registry], self.tables[registry]
        if watcher is not None and table is not None:
            table.unwatch(watcher)
            self.watchers[registry] = None
            self.merger.registry_lost(registry, self.now)

    @rule(runner=RUNNERS)
    def start_runner(self, runner: str) -> None:
        self.incarnations[runner] += 1
        self.sequences[runner] = 0
        self.living[runner] = self.incarnations[runner]
        for registry in "ab":
            self.say(runner, registry)

    @rule(runner=RUNNERS)
    def kill_runner(self, runner: str) -> None:
        self.living.pop(runner, None)

    @rule(runner=RUNNERS)
    def drain_runner(self, runner: str) -> None:
        incarnation = self.living.pop(runner, None)
        for registry, table in self.tables.items():
            if incarnation is not None and table is not None and (runner, registry) not in self.cut:
                table.deregister(runner, incarnation)

    @rule(runner=RUNNERS, registry=REGISTRIES)
    def cut_off(self, runner: str, registry: str) -> None:
        self.cut.add((runner, registry))

    @rule(runner=RUNNERS, registry=REGISTRIES)
    def mend(self, runner: str, registry: str) -> None:
        self.cut.discard((runner, registry))

    @rule(registry=REGISTRIES)
    def suspend_registry(self, registry: str) -> None:
        """Its machine slept while the world went on; it can't be told from one that was cut off from everybody."""
        others = [other for other in "ab" if other != registry]
        for _ in range(20):
            self.pass_time(others)

    @rule(steps=st.integers(1, 10))
    def pass_some_time(self, steps: int) -> None:
        for _ in range(steps):
            self.pass_time(["a", "b"])

    # --- how the world goes on --------------------------------------------------------------------------------------

    def pass_time(self, awake: list[str]) -> None:
        self.now += STEP
        for registry in awake:
            table = self.tables[registry]
            if table is None:
                continue
            table.expire(self.now)  # before it hears anybody: after a standstill either may come first
            for runner in self.living:
                self.say(runner, registry)
            self.flush(registry)

    def say(self, runner: str, registry: str) -> None:
        table = self.tables[registry]
        if table is None or (runner, registry) in self.cut:
            return
        self.sequences[runner] += 1
        incarnation, sequence = self.living[runner], self.sequences[runner]
        try:
            table.heartbeat(runner, incarnation, sequence, READY, Load(), self.now)
        except UnknownLeaseError:
            table.register(record(runner, incarnation, sequence), self.now)

    def flush(self, registry: str) -> None:
        watcher = self.watchers[registry]
        if watcher is not None:
            self.merger.apply(registry, watcher.take(self.now), self.now)

    # --- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def the_merger_is_consistent(self) -> None:
        self.merger.validate_state()

    @invariant()
    def whoever_a_connected_registry_holds_is_there(self) -> None:
        for registry, watcher in self.watchers.items():
            table = self.tables[registry]
            if watcher is None or table is None or watcher.pending:
                continue
            for leased in table.leased(self.now):
                entry = self.merger.directory.get(leased.record.runner.runner_id)
                assert entry is not None, f"{leased.record.runner.runner_id} has a lease at {registry}"
                assert entry.record.version >= leased.record.version

    def teardown(self) -> None:
        """Everything is mended: in the end the directory is the truth, and on the way nobody who lives is lost."""
        if not hasattr(self, "merger"):
            return
        self.cut.clear()
        for registry in "ab":
            if self.tables[registry] is None:
                self.start_registry(registry)
            self.connect(registry)
        known = {runner for runner in self.living if self.merger.directory.get(runner) is not None}
        for _ in range(round((3 * TTL + LINGER) / STEP)):
            self.pass_time(["a", "b"])
            assert known <= self.merger.directory.entries.keys()
        assert {
            runner: entry.record.runner.incarnation for runner, entry in self.merger.directory.entries.items()
        } == self.living
        assert self.merger.directory.synced


class Restarts(RuleBasedStateMachine):
    """Registries restart and connections break, but runners live and reach both: then nobody ever vanishes."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.world.begin()
        for runner in "xyz":
            self.world.start_runner(runner)
        self.world.pass_time(["a", "b"])

    @rule(registry=REGISTRIES)
    def restart(self, registry: str) -> None:
        self.world.start_registry(registry)

    @rule(registry=REGISTRIES)
    def kill(self, registry: str) -> None:
        self.world.kill_registry(registry)

    @rule(registry=REGISTRIES)
    def connect(self, registry: str) -> None:
        self.world.connect(registry)

    @rule(registry=REGISTRIES)
    def disconnect(self, registry: str) -> None:
        self.world.disconnect(registry)

    @rule(steps=st.integers(1, 60))
    def wait(self, steps: int) -> None:
        self.world.pass_some_time(steps)
        self.everybody_is_there()

    @rule(registry=REGISTRIES)
    def suspend(self, registry: str) -> None:
        self.world.suspend_registry(registry)

    @invariant()
    def everybody_is_there(self) -> None:
        self.world.the_merger_is_consistent()
        assert self.world.merger.directory.entries.keys() == set("xyz")


TestWorld = World.TestCase
TestRestarts = Restarts.TestCase
TestWorld.settings = settings(max_examples=60, deadline=None)
TestRestarts.settings = settings(max_examples=40, deadline=None)
