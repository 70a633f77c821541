"""The record of what a caller has got: no index twice, none left out, whatever runners send."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.errors import EngineError
from chorus.core.generation import DeliveredChoice
from chorus.core.resilience.delivered import Delivered


def token(choice: int, index: int) -> int:
    """The one right token of a place."""
    return choice * 1000 + index


def begun(delivered: Delivered, *, with_ids: bool = True, can_resume: bool = True) -> Delivered:
    delivered.begin(with_ids=with_ids, can_resume=can_resume)
    return delivered


deltas = st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(1, 4), st.sampled_from(["right"] * 5 + ["wrong"]))


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.integers(1, 3),
    st.dictionaries(st.integers(0, 2), st.integers(0, 5), max_size=3),
    st.lists(st.one_of(deltas, st.none()), max_size=60),
)
def test_every_choice_grows_without_gap_and_repeat(
    choice_count: int, given_counts: dict[int, int], script: list[tuple[int, int, int, str] | None]
) -> None:
    """None in the script is a failed attempt, and the next one begins."""
    had = {number: count for number, count in given_counts.items() if number < choice_count}
    resume = [DeliveredChoice(number, tuple(token(number, i) for i in range(count))) for number, count in had.items()]
    delivered = begun(Delivered(choice_count, resume))
    model = {number: had.get(number, 0) for number in range(choice_count)}
    count = 0
    for step in script:
        if step is None:
            begun(delivered)
            continue
        number, index, size, rightness = step
        ids = [token(number, index + i) + (7 if rightness == "wrong" else 0) for i in range(size)]
        next_index = model.get(number, 0)
        if (
            number >= choice_count
            or index + size > next_index != index
            or (rightness == "wrong" and index != next_index)
        ):
            with pytest.raises(EngineError):
                delivered.take(number, index, ids)
        elif index == next_index:
            if rightness == "wrong":
                continue  # nobody can know
            assert delivered.take(number, index, ids) == index
            model[number] += size
            count += size
        else:
            assert delivered.take(number, index, ids) is None
        assert delivered.output_tokens == count
        assert delivered.started is (count > 0)
    told = {choice.choice: choice.token_ids for choice in delivered.choices()}
    assert told == {number: tuple(token(number, i) for i in range(size)) for number, size in model.items() if size}
    assert delivered.obstacle == ""
    for number, size in model.items():
        assert delivered.token_count(number, size) == size
        with pytest.raises(EngineError, match=f"choice {number} has {size + 1}"):
            delivered.token_count(number, size + 1)


def test_what_comes_beside_the_ids_takes_no_place() -> None:
    delivered = begun(Delivered())
    assert delivered.take(0, 0, [1, 2], "a") == 0
    assert delivered.take(0, 2, [], "", more=True) == 2  # a second tool call
    assert delivered.take(0, 2, [3], "b") == 2
    assert delivered.choices() == (DeliveredChoice(0, (1, 2, 3)),)
    assert delivered.obstacle == ""


def test_when_the_first_and_the_last_came_is_noted() -> None:
    delivered = begun(Delivered())
    for index, now in enumerate((5.0, 6.0, 9.0)):
        delivered.take(0, index, [1], now=now)
    assert (delivered.first_at, delivered.last_at) == (5.0, 9.0)


# --- without token ids ----------------------------------------------------------------------------------------------


def texts(delivered: Delivered, pieces: list[tuple[int, str]]) -> list[int | None]:
    return [delivered.take(0, index, (), text) for index, text in pieces]


@pytest.mark.parametrize("begins_at", [0, 2, 9])
def test_an_engine_that_counts_anew_has_its_indexes_shifted(begins_at: int) -> None:
    delivered = begun(Delivered(allow_text=True), with_ids=False)
    assert texts(delivered, [(0, "a"), (1, "b")]) == [0, 1]
    assert (delivered.obstacle, delivered.from_text) == ("", True)
    begun(delivered, with_ids=False)
    assert texts(delivered, [(begins_at, "c"), (begins_at + 1, "d")]) == [2, 3]
    assert delivered.choices() == (DeliveredChoice(0, (), "abcd", token_count=4),)
    with pytest.raises(EngineError, match="where 4 comes next"):
        delivered.take(0, begins_at + 5, (), "f")
    if begins_at == 0:
        assert delivered.token_count(0, 2) == 4


def test_text_of_a_caller_begins_where_the_engine_says() -> None:
    for begins_at in (0, 7):
        delivered = begun(Delivered(1, [DeliveredChoice(0, (), "abc")], allow_text=True), with_ids=False)
        assert texts(delivered, [(begins_at, "d"), (begins_at + 1, "e")]) == [begins_at, begins_at + 1]
        assert delivered.choices() == (DeliveredChoice(0, (), "abcde", token_count=min(begins_at + 2, 5)),)


@pytest.mark.parametrize("begins_at", [0, 3])
def test_text_whose_tokens_the_caller_counted_goes_on_with_the_next_index(begins_at: int) -> None:
    """Whether its engine knows of that count or begins to count anew."""
    resume = [DeliveredChoice(0, (), "abc def", token_count=3)]
    delivered = begun(Delivered(1, resume, allow_text=True), with_ids=False)
    assert delivered.token_total == 3
    assert texts(delivered, [(begins_at, "d"), (begins_at + 1, "e")]) == [3, 4]
    assert delivered.token_count(0, begins_at + 2) == delivered.token_total == 5


def test_an_engine_without_ids_goes_on_from_the_text_that_the_caller_gave_with_its_ids() -> None:
    resume = [DeliveredChoice(0, (7, 8), "abc def")]
    delivered = begun(Delivered(1, resume, allow_text=True), with_ids=False)
    assert texts(delivered, [(0, "!")]) == [2]
    assert delivered.choices() == (DeliveredChoice(0, (), "abc def!", token_count=3),)
    # One without ids was asked first, and had nothing to say.
    delivered = begun(begun(Delivered(1, resume, allow_text=True), with_ids=False))
    assert delivered.take(0, 2, [9], "!") == 2
    assert delivered.choices() == (DeliveredChoice(0, (7, 8, 9)),)


def test_no_more_tokens_are_told_than_their_text_can_have() -> None:
    delivered = begun(Delivered(allow_text=True), with_ids=False)
    texts(delivered, [(0, ""), (1, ""), (2, "ü")])
    assert delivered.choices() == (DeliveredChoice(0, (), "ü", token_count=2),)


@pytest.mark.parametrize(
    ("allow_text", "with_ids", "can_resume", "more", "told"),
    [
        (False, False, False, False, "without token ids"),
        (True, False, True, True, "only plain text"),
        (True, True, False, False, "cannot go on from token ids"),
        (True, False, False, False, ""),
        (False, True, True, True, ""),
    ],
)
def test_what_stands_in_the_way_is_told(
    allow_text: bool, with_ids: bool, can_resume: bool, more: bool, told: str
) -> None:
    delivered = begun(Delivered(allow_text=allow_text), with_ids=with_ids, can_resume=can_resume)
    delivered.take(0, 0, [1] if with_ids else [], "a", more=more)
    begun(delivered)  # what the next runner has changes nothing
    assert told in delivered.obstacle
    assert bool(told) is bool(delivered.obstacle)


def test_several_choices_of_text_cannot_go_on() -> None:
    delivered = begun(Delivered(2, allow_text=True), with_ids=False)
    delivered.take(0, 0, [], "a")
    assert "single choice" in delivered.obstacle


def test_text_that_must_have_a_form_cannot_go_on() -> None:
    """A grammar would begin anew in the middle of it; from token ids an engine finds its place again."""
    for with_ids, told in ((False, "form"), (True, "")):
        delivered = begun(Delivered(allow_text=True, has_form=True), with_ids=with_ids)
        delivered.take(0, 0, [1] if with_ids else [], '{"age"')
        assert (told in delivered.obstacle, bool(delivered.obstacle)) == (True, not with_ids)


attempts = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=1, max_size=6)


@settings(deadline=None)
@given(st.integers(0, 4), st.sampled_from(["ids", "text", "both"]), attempts)
def test_nothing_is_lost_or_doubled_whoever_goes_on(had: int, form: str, script: list[tuple[bool, bool, int]]) -> None:
    """Attempts on engines with ids or without, which count on or anew, in any order that placement allows."""

    def pieces(count: int) -> str:
        return "".join(f"<{place}>" for place in range(count))

    ids, text = tuple(range(had)), pieces(had)
    given = DeliveredChoice(0, () if form == "text" else ids, "" if form == "ids" else text, had * (form == "text"))
    delivered = Delivered(1, [given] if had else [], allow_text=True)
    asked, count = ([given] if had else []), had
    for with_ids, counts_anew, size in script:
        if delivered.started:
            assert delivered.obstacle == ""
            asked, with_ids = list(delivered.choices()), not delivered.from_text
        elif had and form == ("text" if with_ids else "ids"):
            begun(delivered, with_ids=with_ids)
            continue  # such an engine refuses what the caller has
        for choice in asked:  # all of it, as an engine of this kind takes it
            assert (choice.token_ids == tuple(range(count))) if with_ids else (choice.text == pieces(count))
        begun(delivered, with_ids=with_ids)
        first = 0 if counts_anew and not with_ids else sum(choice.tokens for choice in asked)
        for step in range(size):
            assert delivered.take(0, first + step, [count] if with_ids else (), f"<{count}>") == count
            count += 1
        if size:
            assert delivered.token_count(0, first + size) == delivered.token_total == count
