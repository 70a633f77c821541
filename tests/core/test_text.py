"""Text of tokens: whole characters, stop strings, tool calls; against references that see everything at once."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chorus.core.generation import FinishReason
from chorus.core.text.completion import Completion
from chorus.core.text.stops import StopMatcher, StopStrings
from chorus.core.text.strict_json import parse_json
from chorus.core.text.tool_calls import ToolCallReader, WrittenCall

END = 999
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
letters = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def reference(text: str, strings: list[str]) -> tuple[str, str | None]:
    """Up to the stop string that ends first, the longest of those that end there."""
    for end in range(len(text) + 1):
        ending = [string for string in strings if text[:end].endswith(string)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def completion(strings: list[str], limit: int = 10_000) -> Completion:
    return Completion(
        limit=limit, limit_reason=FinishReason.LENGTH, stops=StopStrings(strings), end_tokens=frozenset((END,))
    )


@given(letters, stops, st.lists(st.integers(0, 40), max_size=10))
@example("abcab", ["bca", "c"], [])
def test_stop_strings_are_found_however_the_text_is_cut(text: str, strings: list[str], places: list[int]) -> None:
    matcher = StopMatcher(StopStrings(strings))
    pieces = [piece.decode() for piece in cut(text.encode(), places)]
    given_out = "".join(matcher.feed(piece) for piece in pieces)
    if matcher.matched is None:
        given_out += matcher.flush()
    assert (given_out, matcher.matched) == reference(text, strings)


@given(letters, stops)
def test_only_what_may_become_a_stop_string_is_withheld(text: str, strings: list[str]) -> None:
    matcher = StopMatcher(StopStrings(strings))
    given_out = matcher.feed(text)
    if matcher.matched is None:
        withheld = text[len(given_out) :]
        beginnings = {string[:size] for string in strings for size in range(len(string))}
        longest = next(text[start:] for start in range(len(text) + 1) if text[start:] in {*beginnings, ""})
        assert withheld == longest


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=12))
@example("🙂 สวัสดี é".encode(), list(range(40)))
@example(b"\xf0\x9f\x98", [1, 2])
@example(b"\xe0\x80\xffab", [1])
def test_only_whole_characters_come_out(data: bytes, places: list[int]) -> None:
    answer = completion([])
    texts = [answer.accept(token_id, piece) for token_id, piece in enumerate(cut(data, places))]
    texts.append(answer.accept(END, b""))
    assert "".join(texts) == data.decode("utf-8", "replace")
    assert answer.reason is FinishReason.END


@given(st.text("ab🙂ส", max_size=12), st.lists(st.text("ab🙂ส", min_size=1, max_size=3), max_size=3), st.data())
def test_replaying_what_was_delivered_goes_on_in_the_same_state(
    text: str, strings: list[str], data: st.DataObject
) -> None:
    tokens = [(number, bytes((byte,))) for number, byte in enumerate(text.encode())] + [(END, b"")]
    whole = completion(strings)
    expected = [whole.accept(*token) for token in tokens if whole.reason is None]
    split = data.draw(st.integers(0, len(expected)))
    resumed = completion(strings)
    before = [resumed.accept(*token) for token in tokens[:split]]
    after = [resumed.accept(*token) for token in tokens[split:] if resumed.reason is None]
    assert before + after == expected
    assert (resumed.reason, resumed.stop_string, resumed.count) == (whole.reason, whole.stop_string, whole.count)


def test_a_choice_ends_for_its_limit_with_everything_that_was_withheld() -> None:
    answer = completion(["abc"], limit=2)
    assert answer.accept(1, b"xa") == "x"
    assert answer.accept(2, b"b\xf0\x9f") == "ab\ufffd"
    assert answer.reason is FinishReason.LENGTH
    assert completion([], limit=0).reason is FinishReason.LENGTH


def test_a_stop_token_ends_it_and_an_ignored_end_does_not() -> None:
    answer = Completion(
        limit=9, limit_reason=FinishReason.LENGTH, stops=StopStrings([]), stop_tokens=frozenset((5,)),
        end_tokens=frozenset((END,)), ignore_eos=True,
    )  # fmt: skip
    assert answer.accept(END, b"") == ""
    assert answer.reason is None
    assert answer.accept(5, b"five") == ""
    assert answer.reason is FinishReason.STOP
    assert answer.count == 2


calls = st.builds(
    lambda name, arguments: {"name": name, "arguments": arguments},
    st.text("abc_", min_size=1, max_size=5),
    st.dictionaries(st.text("xy<>", max_size=3), st.integers() | st.text("<>/tol_ca", max_size=12), max_size=2),
)
plain = st.text("<>/tol_ca x", max_size=15).filter(lambda text: "<tool_call>" not in text)


@given(st.lists(plain | calls, max_size=5), st.lists(st.integers(0, 400), max_size=30))
def test_tool_calls_are_parted_from_text_however_it_is_cut(
    parts: list[str | dict[str, object]], places: list[int]
) -> None:
    merged: list[str | dict[str, object]] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            continue  # two texts side by side might make a tag
        merged.append(part)
    written = "".join(
        part if isinstance(part, str) else f"<tool_call>\n{json.dumps(part)}\n</tool_call>" for part in merged
    )
    reader = ToolCallReader()
    text, found = "", []
    for piece in cut(written.encode(), places):
        more, new = reader.feed(piece.decode())
        text += more
        found += new
    text += reader.flush()
    inside = [part for part in merged if not isinstance(part, str)]
    if all("</tool_call>" not in json.dumps(part) for part in inside) and "<tool_call>" not in text:
        assert text == "".join(part for part in merged if isinstance(part, str))
        assert found == [WrittenCall(str(part["name"]), json.dumps(part["arguments"])) for part in inside]


def test_what_is_no_call_stays_text() -> None:
    reader = ToolCallReader()
    broken = "<tool_call>{not json}</tool_call>"
    assert reader.feed(f"a{broken}b") == (f"a{broken}b", [])
    assert reader.feed("<tool_call>{") == ("", [])
    assert reader.flush() == "<tool_call>{"
    assert reader.count == 0


@given(anything, st.booleans())
@example("🙂", True)
def test_json_is_read_as_it_was_written(value: object, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only)) == value


@pytest.mark.parametrize(
    "odd", ["NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', '{"\\udc00": 1}', "9" * 5000, "[" * 100_000, "{", ""]
)
def test_what_not_every_reader_takes_is_no_json(odd: str) -> None:
    for text in (odd, f"[1, {odd}]"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)
    call = f'<tool_call>{{"name": "f", "arguments": {odd}}}</tool_call>'
    assert ToolCallReader().feed(call) == (call, [])
