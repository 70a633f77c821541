"""What a terminal shows of text that arrives in pieces, against the whole text wrapped at once."""

from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len

from chorus.cli.wrapping import WordWrap

TEXTS = st.text(st.sampled_from(list("ab cd\n ef漢,")), max_size=120)
_BACK = re.compile(r"\x1b\[(\d+)D\x1b\[K")


def shown(sent: str) -> list[str]:
    """The lines of a terminal wide enough for anything, after it was sent this."""
    lines = [""]
    position = 0
    while position < len(sent):
        back = _BACK.match(sent, position)
        if back:
            count = int(back[1])
            while count > 0:
                count -= cell_len(lines[-1][-1])
                lines[-1] = lines[-1][:-1]
            position = back.end()
            continue
        if sent[position] == "\n":
            lines.append("")
        else:
            lines[-1] += sent[position]
        position += 1
    return lines


@given(text=TEXTS, cuts=st.lists(st.integers(0, 120), max_size=6), width=st.integers(4, 30))
@example(text=" aa漢", cuts=[], width=4)
def test_no_line_is_too_long_and_no_word_is_lost(text: str, cuts: list[int], width: int) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[start:end] for start, end in pairwise(places)]
    wrap = WordWrap(width)
    lines = shown("".join(wrap.feed(piece) for piece in pieces))
    assert all(cell_len(line) < width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    whole = WordWrap(width)
    assert lines == shown(whole.feed(text))


@given(text=TEXTS, width=st.integers(4, 30))
def test_words_that_fit_a_line_are_never_broken(text: str, width: int) -> None:
    words = text.split()
    if any(cell_len(word) >= width - 1 for word in words):
        return
    assert "\n".join(shown(WordWrap(width).feed(text))).split() == words


def test_a_word_that_grows_beyond_the_edge_moves_to_the_next_line() -> None:
    wrap = WordWrap(10)
    assert wrap.feed("hello wor") == "hello wor"
    assert wrap.feed("ld") == "\x1b[3D\x1b[K\nworld"
