"""Answers that coordinators share, in a real Valkey or Redis: found by all, forgotten by all, and lost with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import count

import numpy as np
import pytest

from chorus.config import ValkeySettings
from chorus.core.errors import UnavailableError
from chorus.store.answers import Kept, NewAnswer
from chorus.store.shared_answers import Questions, SharedAnswers
from chorus.store.valkey import Valkey
from tests.store.test_answers import LARGE, unit
from tests.store.valkey_server import ValkeyServer, running

_MESHES = count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    yield from running(tmp_path_factory.mktemp("valkey"))


class Coordinators:
    """Stores of one mesh; `now` is everybody's clock."""

    def __init__(self, server: ValkeyServer) -> None:
        self._server = server
        self._prefix = f"mesh-{next(_MESHES)}:"
        self._stores: list[SharedAnswers] = []
        self.now = 10.0

    def store(self, *, max_entries: int = 100, max_bytes: int = LARGE, ttl_s: float = 600.0) -> SharedAnswers:
        valkey = Valkey.configured(ValkeySettings(url_file=self._server.url_file, prefix=self._prefix, timeout_s=5))
        assert valkey is not None
        store = SharedAnswers(
            valkey,
            ttl_s=ttl_s,
            max_entries=max_entries,
            max_bytes=max_bytes,
            clock=lambda: self.now,
            wall=lambda: self.now,
        )
        self._stores.append(store)
        return store

    async def close(self) -> None:
        for store in self._stores:
            await store.close()


@pytest.fixture
async def mesh(server: ValkeyServer) -> AsyncIterator[Coordinators]:
    coordinators = Coordinators(server)
    yield coordinators
    await coordinators.close()


def _text(kept: Kept | None) -> bytes | None:
    return None if kept is None else kept.answer


async def test_one_keeps_what_another_one_finds_by_artifact_and_age(mesh: Coordinators) -> None:
    one, other = mesh.store(), mesh.store()
    await one.put(NewAnswer("k", "s1", "ann", b"first", 3), 1.0)
    await one.put(NewAnswer("k", "s2", "ann", b"second", 4), 2.0)
    found = await other.find("k", ["s1", "s2"], since=0.0, now=3.0)
    assert found is not None
    assert (found.answer, found.sha256, found.tokens, found.made) == (b"second", "s2", 4, 2.0)
    assert _text(await other.find("k", ["s1"], since=0.0, now=3.0)) == b"first"
    assert _text(await other.find("k", None, since=-1.0, now=3.0)) == b"second"
    assert await other.find("k", ["s1"], since=1.0, now=3.0) is None
    assert await other.find("k", ["s3"], since=0.0, now=3.0) is None
    assert await other.find("k", [], since=0.0, now=3.0) is None
    await other.put(NewAnswer("k", "s2", "ann", b"anew", 4), 4.0)
    assert _text(await one.find("k", ["s1", "s2"], since=0.0, now=5.0)) == b"anew"
    assert (await one.count(None))[0] == 2


async def test_a_caller_forgets_its_own_everywhere(mesh: Coordinators) -> None:
    one, other = mesh.store(), mesh.store()
    for number, caller in enumerate(["ann", "ann", "bob"]):
        new = NewAnswer(f"k{number}", "s", caller, b"x" * 10, 1, f"q{number}", "b", unit(1.0, float(number)))
        await one.put(new, mesh.now)
    assert (await other.count("ann"))[0] == 2
    assert (await other.count("bob"))[1] > 10
    assert len(await one.near("b", ["s"], unit(1.0), since=0.0, limit=5)) == 3
    assert await other.clear("ann") == 2
    assert await one.find("k0", ["s"], since=0.0, now=2.0) is None
    assert [kept.question for kept in await one.near("b", ["s"], unit(1.0), since=0.0, limit=5)] == ["q2"]
    assert await other.clear(None) == 1
    assert await one.count(None) == (0, 0)


async def test_a_question_is_near_for_others_in_its_bucket_alone_and_counts_what_was_right(mesh: Coordinators) -> None:
    one, other = mesh.store(), mesh.store()
    for number, bucket in enumerate(["b", "b", "other"]):
        new = NewAnswer(f"k{number}", "s", "ann", b"x", 1, f"q{number}", bucket, unit(1.0, float(number)))
        await one.put(new, 5.0)
    found = await other.near("b", ["s"], unit(1.0), since=0.0, limit=5)
    assert [kept.question for kept in found] == ["q0", "q1"]
    assert found[0].cosine == pytest.approx(1.0, abs=1e-3)
    assert await other.near("b", ["another"], unit(1.0), since=0.0, limit=5) == []
    assert await other.near("b", ["s"], unit(1.0), since=5.0, limit=5) == []
    assert await other.near("b", ["s"], np.ones(3, np.float32), since=0.0, limit=5) == []
    await other.judged(found[0].id, right=True)
    await other.judged(found[0].id, right=False)
    (again,) = await one.near("b", ["s"], unit(1.0), since=0.0, limit=1)
    assert (again.right, again.wrong) == (1, 1)
    # Another answer in its place: it is found once, and what was said of the one before counts no more.
    await one.put(NewAnswer("k0", "s", "ann", b"y", 1, "q0", "b", unit(1.0)), 6.0)
    again, _ = await other.near("b", ["s"], unit(1.0), since=0.0, limit=5)
    assert (again.answer, again.right, again.wrong) == (b"y", 0, 0)


async def test_those_least_used_make_room_whoever_used_them(mesh: Coordinators) -> None:
    one, other = mesh.store(max_entries=3), mesh.store(max_entries=3)
    for number in range(3):
        new = NewAnswer(f"k{number}", "s", "ann", b"x", 1, f"q{number}", "b", unit(1.0, float(number)))
        await one.put(new, float(number))
    assert await other.find("k0", ["s"], since=-1.0, now=7.0) is not None
    (first,) = await other.near("b", ["s"], unit(1.0, 1.0), since=-1.0, limit=1)
    other.touch(first.id, 8.0)
    await asyncio.gather(*other._touching)
    await one.put(NewAnswer("k3", "s", "ann", b"x", 1), 9.0)
    left = [number for number in range(4) if await other.find(f"k{number}", ["s"], since=-1.0, now=9.0) is not None]
    assert left == [0, 1, 3]
    assert (await one.count(None))[0] == 3


async def test_bytes_are_bounded_too_and_an_answer_over_all_of_them_is_not_kept(mesh: Coordinators) -> None:
    store = mesh.store(max_bytes=10_000)
    for number in range(30):
        await store.put(NewAnswer(f"k{number}", "s", "ann", b"x" * 1000, 1), mesh.now + number)
    entries, size = await store.count(None)
    assert 3 <= entries <= 5
    assert size <= 10_000
    await store.put(NewAnswer("huge", "s", "ann", b"x" * 20_000, 1), mesh.now + 99.0)
    assert await store.find("huge", ["s"], since=0.0, now=99.0) is None
    assert await store.find("k29", ["s"], since=0.0, now=99.0) is not None


async def test_what_is_too_old_is_gone_from_the_books_as_well(mesh: Coordinators) -> None:
    store = mesh.store(ttl_s=100.0)
    await store.put(NewAnswer("k", "s", "ann", b"x", 1), mesh.now)
    mesh.now += 101.0
    assert await store.count(None) == (0, 0)
    assert await store.find("k", ["s"], since=0.0, now=mesh.now) is None


async def test_a_server_that_dies_is_left_alone_for_a_while_and_used_again(
    mesh: Coordinators, server: ValkeyServer
) -> None:
    store = mesh.store()
    new = NewAnswer("k", "s", "ann", b"x", 1, "q", "b", unit(1.0))
    await store.put(new, mesh.now)
    assert len(await store.near("b", ["s"], unit(1.0), since=0.0, limit=1)) == 1
    server.kill()
    with pytest.raises(UnavailableError, match="reached"):
        await store.find("k", ["s"], since=0.0, now=1.0)
    server.start()
    with pytest.raises(UnavailableError, match="a moment ago"):
        await store.put(new, mesh.now)
    mesh.now += 3.0
    assert await store.near("b", ["s"], unit(1.0), since=0.0, limit=1) == []  # it has lost all
    await store.put(new, mesh.now)
    assert _text(await store.find("k", ["s"], since=0.0, now=1.0)) == b"x"
    assert len(await store.near("b", ["s"], unit(1.0), since=0.0, limit=1)) == 1


async def test_a_coordinator_that_is_started_reads_the_questions_of_all(
    mesh: Coordinators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chorus.store.shared_answers._READ_AT_ONCE", 2)
    one, other = mesh.store(), mesh.store()
    for number in range(5):
        new = NewAnswer(f"k{number}", "s", "ann", b"x", 1, f"q{number}", "b", unit(1.0, float(number)))
        await one.put(new, 5.0)
    assert len(await other.near("b", ["s"], unit(1.0), since=0.0, limit=9)) == 2  # a request waits for some alone
    assert other._reading is not None
    await other._reading
    assert len(await other.near("b", ["s"], unit(1.0), since=0.0, limit=9)) == 5


def test_questions_are_as_many_as_answers_at_most() -> None:
    questions = Questions(2)
    for number in range(4):
        questions.add(f"m{number}", 7, bytes([number]) * 8)
    assert [questions.member(number) for number in questions.near(7, np.zeros(1, np.uint64))] == ["m2", "m3"]
    questions.remove(3)
    questions.remove(3)
    assert [questions.member(number) for number in questions.near(7, np.zeros(1, np.uint64))] == ["m3"]
