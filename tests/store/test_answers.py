"""The store of answers, against a plain model of it, and its file over restarts and damage."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chorus.store.answer_store import AnswerStore
from chorus.store.answers import AnswerFile, Kept, NewAnswer
from chorus.store.recent import Recent

KEYS, SHAS, CALLERS = st.sampled_from("abcde"), st.sampled_from(["s1", "s2"]), st.sampled_from(["ann", "bob"])
LARGE = 1 << 20


def unit(*values: float) -> np.ndarray:
    vector = np.zeros(70, np.float32)
    vector[: len(values)] = values
    vector[len(values) :] = 0.01
    return vector / np.linalg.norm(vector)


class Answers(RuleBasedStateMachine):
    """At most four answers, of which the one longest unused goes."""

    def __init__(self) -> None:
        super().__init__()
        self.file = AnswerFile(None, max_entries=4, max_bytes=LARGE)
        self.model: dict[tuple[str, str], tuple[str, bytes, float, float]] = {}  # caller, answer, made, used
        self.now = 0.0

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    @rule(key=KEYS, sha=SHAS, caller=CALLERS, answer=st.binary(max_size=3))
    def put(self, key: str, sha: str, caller: str, answer: bytes) -> None:
        now = self.tick()
        self.file.put(NewAnswer(key, sha, caller, answer, 1), now)
        self.model.pop((key, sha), None)
        self.model[key, sha] = (caller, answer, now, now)
        while len(self.model) > 4:
            del self.model[min(self.model, key=lambda one: self.model[one][3])]

    @rule(key=KEYS, shas=st.lists(SHAS, max_size=2), back=st.integers(0, 10))
    def find(self, key: str, shas: list[str], back: int) -> None:
        now = self.tick()
        since = now - back
        those = [
            one for one, (_, _, made, _) in self.model.items() if one[0] == key and one[1] in shas and made > since
        ]
        found = self.file.find(key, shas, since=since)
        if not those:
            assert found is None
            return
        best = max(those, key=lambda one: self.model[one][2])
        caller, answer, made, _ = self.model[best]
        assert found is not None
        assert (found.sha256, found.answer, found.made) == (best[1], answer, made)
        self.file.used({found.id: now})
        self.model[best] = (caller, answer, made, now)

    @rule(caller=CALLERS)
    @precondition(lambda self: self.model)
    def clear(self, caller: str) -> None:
        gone = [one for one, (whose, *_) in self.model.items() if whose == caller]
        assert self.file.clear(caller) == len(gone)
        for one in gone:
            del self.model[one]

    @invariant()
    def counts_agree(self) -> None:
        assert self.file.entries == len(self.model)
        for caller in ("ann", "bob"):
            assert self.file.count(caller)[0] == sum(whose == caller for whose, *_ in self.model.values())


Answers.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestAnswers = Answers.TestCase


def test_an_answer_outlives_its_process_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.sqlite"
    file = AnswerFile(path, max_entries=10, max_bytes=LARGE)
    file.put(NewAnswer("k", "s", "ann", b"yes", 3, "Why?", "b", unit(1.0)), 5.0)
    file.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = AnswerFile(path, max_entries=10, max_bytes=LARGE)
    found = again.find("k", None, since=0.0)
    assert found is not None
    assert (found.answer, found.tokens, found.made) == (b"yes", 3, 5.0)
    assert not again.load_more()
    (near,) = again.near("b", ["s"], unit(1.0), since=0.0, limit=3)
    assert near.question == "Why?"
    assert near.cosine == pytest.approx(1.0, abs=1e-3)
    again.close()


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be one" * 30, b""])
def test_a_file_of_something_else_is_made_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_bytes(content)
    file = AnswerFile(path, max_entries=10, max_bytes=LARGE)
    file.put(NewAnswer("k", "s", "ann", b"yes", 3), 5.0)
    assert file.entries == 1
    file.close()


def test_a_question_is_near_in_its_bucket_alone_and_counts_what_was_right() -> None:
    file = AnswerFile(None, max_entries=10, max_bytes=LARGE)
    for number, bucket in enumerate(["b", "b", "other"]):
        vector = unit(1.0, float(number))
        file.put(NewAnswer(f"k{number}", "s", "ann", b"x", 1, f"q{number}", bucket, vector), 5.0)
    found = file.near("b", ["s"], unit(1.0), since=0.0, limit=5)
    assert [kept.question for kept in found] == ["q0", "q1"]
    assert found[0].cosine > found[1].cosine
    assert file.near("b", ["another"], unit(1.0), since=0.0, limit=5) == []
    assert file.near("b", ["s"], unit(1.0), since=5.0, limit=5) == []
    file.judged(found[0].id, right=True)
    file.judged(found[0].id, right=False)
    again = file.near("b", ["s"], unit(1.0), since=0.0, limit=1)[0]
    assert (again.right, again.wrong) == (1, 1)
    file.clear(None)
    assert file.near("b", ["s"], unit(1.0), since=0.0, limit=5) == []


def test_an_old_file_is_of_use_at_once_and_its_questions_come_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chorus.store.answers._LOADED_AT_ONCE", 2)
    path = tmp_path / "answers.sqlite"

    def put(file: AnswerFile, number: int) -> None:
        file.put(NewAnswer(f"k{number}", "s", "ann", b"x", 1, f"q{number}", "b", unit(1.0, float(number))), number)

    def known(file: AnswerFile) -> set[str]:
        return {kept.question for kept in file.near("b", ["s"], unit(1.0), since=-1.0, limit=9)}

    file = AnswerFile(path, max_entries=6, max_bytes=LARGE)
    for number in range(6):
        put(file, number)
    first = file.find("k0", None, since=-1.0)
    assert first is not None
    file.used({first.id: 9.0})  # k1 is the longest unused now
    file.close()
    again = AnswerFile(path, max_entries=6, max_bytes=LARGE)
    assert again.find("k3", None, since=-1.0) is not None
    assert known(again) == set()
    assert again.load_more()
    assert known(again) == {"q5", "q4"}
    put(again, 5)  # replaces one that is loaded
    put(again, 2)  # and one that is not
    put(again, 7)  # for which one that is not loaded makes room
    while again.load_more():
        pass
    assert known(again) == {"q0", "q2", "q3", "q4", "q5", "q7"}
    again.close()


async def test_a_store_loads_an_old_file_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    for rounds in range(2):
        store = AnswerStore(path, max_entries=9, max_bytes=LARGE)
        if not rounds:
            await store.put(NewAnswer("k", "s", "ann", b"x", 1, "q", "b", unit(1.0)), 1.0)
        assert (await store.count(None))[0] == 1  # opens it
        assert await store.near("b", ["s"], unit(1.0), since=0.0, limit=3)  # what came before is loaded by then
        await store.close()
        await store.close()


async def test_what_was_found_a_moment_ago_is_found_until_it_changes() -> None:
    store = AnswerStore(None, max_entries=3, max_bytes=LARGE)

    async def found(key: str, *shas: str, since: float = 0.0, now: float = 9.0) -> bytes | None:
        kept = await store.find(key, shas, since=since, now=now)
        return None if kept is None else kept.answer

    async def put(key: str, sha: str, caller: str, answer: bytes, now: float) -> None:
        await store.put(NewAnswer(key, sha, caller, answer, 1), now)

    await put("k", "s", "ann", b"one", 1.0)
    for _ in range(2):
        assert await found("k", "s") == b"one"
        assert await found("k", "s", since=1.0) is None  # too old
        assert await found("k", "other") is None
    await put("k", "s", "ann", b"two", 2.0)
    assert await found("k", "s") == b"two"
    # Found while another one was on its way: no later search may have the older one.
    searching = asyncio.create_task(found("k", "s"))
    keeping = asyncio.create_task(put("k", "s", "ann", b"three", 3.0))
    await asyncio.gather(searching, keeping)
    assert await found("k", "s") == b"three"
    await put("mine", "s", "bob", b"mine", 4.0)
    assert await found("mine", "s", now=9.0) == b"mine"
    assert await store.clear("ann") == 1
    assert await found("k", "s") is None
    # Uses are noted for what was found in memory, too, and those that made room are not found.
    await put("k", "s", "ann", b"four", 5.0)
    await put("other", "s", "ann", b"x", 6.0)
    assert await found("k", "s", now=7.0) == b"four"
    assert await found("mine", "s", now=10.0) == b"mine"
    assert await found("other", "s", now=8.0) == b"x"
    await put("new", "s", "ann", b"y", 11.0)
    assert [await found(key, "s") for key in ("k", "mine", "other", "new")] == [None, b"mine", b"x", b"y"]
    await store.close()


def test_recent_answers_are_bounded_by_their_bytes() -> None:
    recent = Recent()
    for number in range(200):
        recent.found(f"k{number}", ["s"], Kept(number, "s", b"x" * (200 << 10), 1, 1.0), recent.searching())
    assert recent.find("k199", ["s"], since=0.0) is not None
    assert recent.find("k0", ["s"], since=0.0) is None
    assert sum(recent.find(f"k{number}", ["s"], since=0.0) is not None for number in range(200)) == (16 << 20) // (
        200 << 10
    )
    recent.found("huge", ["s"], Kept(1, "s", b"x" * (1 << 20), 1, 1.0), recent.searching())
    assert recent.find("huge", ["s"], since=0.0) is None


def test_bytes_are_bounded_too_and_an_answer_over_all_of_them_is_not_kept() -> None:
    file = AnswerFile(None, max_entries=1000, max_bytes=10_000)
    for number in range(30):
        file.put(NewAnswer(f"k{number}", "s", "ann", b"x" * 1000, 1), float(number))
        assert file.size <= 10_000
    assert file.find("k29", ["s"], since=-1.0) is not None
    assert file.find("k0", ["s"], since=-1.0) is None
    file.put(NewAnswer("huge", "s", "ann", b"x" * 20_000, 1), 99.0)
    assert file.find("huge", ["s"], since=-1.0) is None
    assert file.find("k29", ["s"], since=-1.0) is not None


async def test_a_file_that_can_not_be_had_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = AnswerStore(tmp_path / "file" / "answers.sqlite", max_entries=1, max_bytes=LARGE)
    with pytest.raises(OSError, match="file"):
        await store.count(None)
    await store.close()
