"""The queue of texts: every token is read once and in order, within the limits, with nobody left behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.batching.texts import Piece, TextLimits, TextQueue
from chorus.core.generation import Priority

WHOLE = TextLimits(slots=4, cells=100, batch_tokens=40, longest=100, whole=True)
PIECES = TextLimits(slots=4, cells=100, batch_tokens=40, longest=100, whole=False)

requests = st.lists(
    st.tuples(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.sampled_from(Priority)), min_size=1, max_size=6
)


def read(queue: TextQueue, most: int | None = None) -> tuple[Piece, ...]:
    pieces = queue.plan(most)
    for piece in pieces:
        queue.computed(piece)
    queue.validate()
    return pieces


@given(requests, st.sampled_from([WHOLE, PIECES]), st.data())
def test_every_token_is_read_once(
    asked: list[tuple[list[int], Priority]], limits: TextLimits, data: st.DataObject
) -> None:
    queue, expected, waiting = TextQueue(limits), {}, list(enumerate(asked))
    while waiting or queue.tokens:
        if waiting and (not queue.tokens or data.draw(st.booleans())):
            name, (sizes, priority) = waiting.pop(0)
            expected.update(dict.fromkeys(queue.add(name, sizes, priority), 0))
            queue.validate()
            continue
        if expected and data.draw(st.integers(0, 9)) == 0:
            gone = data.draw(st.sampled_from(sorted({str(text.group) for text in expected})))
            queue.leave(int(gone))
            expected = {text: count for text, count in expected.items() if str(text.group) != gone}
            queue.validate()
            continue
        most = data.draw(st.none() | st.integers(1, 60))
        pieces = queue.plan(most)
        assert pieces or not queue.tokens, "something waits, so something is planned"
        assert len({piece.text.slot for piece in pieces}) == len(pieces) <= limits.slots
        total, room = sum(piece.count for piece in pieces), min(most or limits.batch_tokens, limits.batch_tokens)
        assert total <= room or (limits.whole and len(pieces) == 1)
        for piece in pieces:
            assert piece.start == expected[piece.text] == piece.text.computed
            assert not limits.whole or piece.is_last
            expected[piece.text] += piece.count
            queue.computed(piece)
        queue.validate()
    assert len(queue) == 0
    assert all(count == text.size for text, count in expected.items())


def test_a_single_text_does_not_wait_for_anothers_thousand() -> None:
    queue = TextQueue(WHOLE)
    queue.add("many", [10] * 1000, Priority.INTERACTIVE)
    read(queue)
    queue.add("one", [10], Priority.INTERACTIVE)
    assert queue.waiting == 1
    assert "one" in {piece.text.group for piece in read(queue)}
    assert (queue.waiting, len(queue)) == (0, 1)


def test_urgent_texts_come_first() -> None:
    queue = TextQueue(WHOLE)
    for name, priority in (("later", Priority.BACKGROUND), ("soon", Priority.BATCH), ("now", Priority.INTERACTIVE)):
        queue.add(name, [15, 15], priority)
    order = [piece.text.group for _ in range(3) for piece in read(queue)]
    assert order == ["now", "now", "soon", "soon", "later", "later"]


def test_an_urgent_text_goes_before_the_rest_of_a_long_one() -> None:
    queue = TextQueue(PIECES)
    queue.add("long", [90], Priority.BACKGROUND)
    assert [piece.count for piece in read(queue)] == [40]
    queue.add("short", [10], Priority.INTERACTIVE)
    assert [(piece.text.group, piece.start, piece.count) for piece in read(queue)] == [
        ("short", 0, 10),
        ("long", 40, 30),
    ]


def test_a_long_text_is_not_overtaken_by_short_ones() -> None:
    queue = TextQueue(PIECES)
    queue.add("first", [60], Priority.INTERACTIVE)
    read(queue)
    queue.add("long", [100], Priority.INTERACTIVE)
    queue.add("short", [1], Priority.BACKGROUND)
    assert {piece.text.group for piece in read(queue)} == {"first"}
    assert {piece.text.group for piece in read(queue)} == {"long"}


def test_a_text_longer_than_a_batch_comes_alone_where_it_must_be_whole() -> None:
    queue = TextQueue(WHOLE)
    queue.add("short", [5], Priority.INTERACTIVE)
    queue.add("long", [90], Priority.INTERACTIVE)
    assert [piece.count for piece in read(queue, 20)] == [5]
    assert [piece.count for piece in read(queue, 20)] == [90]


def test_slots_are_given_back_when_a_request_leaves() -> None:
    queue = TextQueue(PIECES)
    queue.add("gone", [100, 3], Priority.INTERACTIVE)
    (piece,) = read(queue)
    assert queue.leave("gone") == [0] != [piece.text.slot]
    assert queue.leave("gone") == []
    assert (queue.tokens, len(queue), queue.plan()) == (0, 0, ())


def test_what_cannot_be_read_is_refused() -> None:
    for sizes in ([], [0], [101]):
        with pytest.raises(ValueError, match="can be read"):
            TextQueue(WHOLE).add("x", sizes, Priority.BATCH)
    with pytest.raises(ValueError, match="impossible"):
        TextLimits(slots=1, cells=5, batch_tokens=1, longest=6, whole=True)
