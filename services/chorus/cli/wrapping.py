"""Text that arrives in pieces, broken between words at the edge of a terminal."""

from __future__ import annotations

from rich.cells import cell_len

_ERASE_TO_END = "\x1b[K"


class WordWrap:
    """Turns pieces of text into what a terminal of `width` cells is to be sent.

    Nothing is held back: a word whose end has not come yet is shown, and moved to the next line once it turns out not
    to fit. Where the terminal's width changes meanwhile, lines break in odd places until the next line feed.
    """

    def __init__(self, width: int) -> None:
        # The last column stays empty: what terminals do about a cursor behind it differs.
        self._width = max(width - 1, 1)
        self._column = 0
        self._word = ""

    def feed(self, text: str) -> str:
        """Returns what to write for the next piece."""
        return "".join(map(self._put, text))

    def break_line(self) -> str:
        """Returns what to write so that what comes next has a line of its own; the text goes on below."""
        line, self._column, self._word = "\n" if self._column else "", 0, ""
        return line

    def _put(self, character: str) -> str:
        if character == "\n":
            self._column, self._word = 0, ""
            return character
        cells = cell_len(character)
        if character.isspace():
            self._word = ""
            if self._column + cells > self._width:
                self._column = 0
                return "\n"
            self._column += cells
            return character
        moved = ""
        if self._column + cells > self._width:
            moved = self._move_word(cells)
        self._word += character
        self._column += cells
        return moved + character

    def _move_word(self, more: int) -> str:
        """Begins a new line, taking along the word so far unless it fills a line with the `more` cells that follow."""
        word, cells = self._word, cell_len(self._word)
        if cells == 0 or cells + more > self._width or cells == self._column:
            self._column, self._word = 0, ""
            return "\n"
        self._column = cells
        return f"\x1b[{cells}D{_ERASE_TO_END}\n{word}"
