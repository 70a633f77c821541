"""How a text is written, beside its words: numbers and symbols in their order, what they touch, and upper case.

`3 - 5` and `5 - 3` have the same words, numbers and symbols; so have `(2 + 3) * 4` and `2 + (3 * 4)`, `a[i-1]` and
`a[1-i]`, `AIDS` and `aids` once they are read as words. Nothing here is weighed: where two questions differ in it, they
are two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from chorus.core.cache.words import WH

TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*|\S")
"""A number, a word, or anything else that is no blank, by itself."""

_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_STRAIGHT = str.maketrans("“”‘’", "\"\"''")
_QUOTES = frozenset("\"'`")
_BRACKETS = frozenset("()[]{}")
_ENDS = frozenset(".!?;:…")  # of a sentence, or of its part
_PROSE = _ENDS | _QUOTES | _BRACKETS | frozenset(",—–")
_JOINS = frozenset("-/&")  # words with words, as in `well-known`


@dataclass(frozen=True, slots=True)
class Writing:
    """`formula` is all of a text that is no prose. `upper`, `lower`: words by how they stand inside a sentence."""

    formula: tuple[str, ...]
    upper: frozenset[str]
    lower: frozenset[str]

    def contradicts(self, other: Writing) -> bool:
        """Whether two texts differ in what is written, or in a word that is a name, or an acronym, in one alone."""
        if self.formula != other.formula:
            return True
        mine, others = self.upper - self.lower, other.upper - other.lower
        return not (mine.isdisjoint(other.lower - other.upper) and others.isdisjoint(self.lower - self.upper))


@dataclass(frozen=True, slots=True)
class _Piece:
    """A token, and whether a blank is before and after it."""

    text: str
    apart_before: bool
    apart_after: bool

    @property
    def is_word(self) -> bool:
        return self.text[0].isalpha()

    @property
    def is_number(self) -> bool:
        return self.text[0].isdigit()


_NOTHING = _Piece(" ", True, True)


def written(text: str) -> Writing:
    """How a text is written; never fails, whatever the text."""
    pieces = _pieces(text)
    return Writing(_formula(pieces), *_cases(pieces))


def formula(text: str) -> tuple[str, ...]:
    """That of a Writing alone."""
    return _formula(_pieces(text))


def _formula(pieces: list[_Piece]) -> tuple[str, ...]:
    """Numbers and symbols in their order, with the words that are operands; of prose alone none.

    Brackets and quotes count where there are symbols or calls at all, or where they touch a number.
    """
    around = [_NOTHING, *pieces, _NOTHING]
    neighbours = list(zip(around, pieces, around[2:], strict=False))
    operators = [_is_operator(*three) for three in neighbours]
    is_code = any(operators) or _is_call(pieces)
    symbols = [
        operator or _is_mark_that_counts(*three, is_code=is_code)
        for operator, three in zip(operators, neighbours, strict=True)
    ]
    found: list[str] = []
    for place, piece in enumerate(pieces):
        if place and symbols[place] and symbols[place - 1] and not piece.apart_before:
            found[-1] += piece.text  # `==` is one
        elif piece.is_number:
            found.append(plain_number(piece.text))
        elif symbols[place] or (piece.is_word and _is_operand(pieces, symbols, place)):
            found.append(piece.text)
    return tuple(found)


def plain_number(text: str) -> str:
    """Without commas, where these part thousands; `3,1,2` is a list."""
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _pieces(text: str) -> list[_Piece]:
    text = text.translate(_STRAIGHT)
    found = list(TOKEN.finditer(text))
    ends = [0, *(match.end() for match in found)]
    starts = [*(match.start() for match in found), len(text) + 1]
    return [
        _Piece(match.group(), not place or starts[place] > ends[place], starts[place + 1] > ends[place + 1])
        for place, match in enumerate(found)
    ]


def _is_call(pieces: list[_Piece]) -> bool:
    """Whether a word or bracket is followed by an opening one at once, as in `f(x)` and `a[i]`."""
    return any(
        after.text in ("(", "[") and not after.apart_before and (before.is_word or before.text in (")", "]"))
        for before, after in pairwise(pieces)
    )


def _is_operator(before: _Piece, piece: _Piece, after: _Piece) -> bool:
    if piece.is_word or piece.is_number or piece.text in _PROSE:
        return piece.text == "`" or (piece.text == "–" and before.is_number and after.is_number)
    if piece.text == "%":  # else it is read as a word
        return piece.apart_before or after.is_number or after.text in ("(", "-")
    joins = piece.text in _JOINS and not piece.apart_before and not piece.apart_after
    return not (joins and all(word.is_word and len(word.text) > 1 for word in (before, after)))


def _is_mark_that_counts(before: _Piece, piece: _Piece, after: _Piece, *, is_code: bool) -> bool:
    """Whether a mark that belongs to prose as a rule does not here."""
    text = piece.text
    touches_number = (before.is_number and not piece.apart_before) or (after.is_number and not piece.apart_after)
    if text in _BRACKETS or text in _QUOTES:
        return is_code or touches_number
    if text == ":":
        return touches_number or not piece.apart_after
    if text == "!":
        return (before.is_number and not piece.apart_before) or not (piece.apart_after or after.text in _PROSE)
    if text in (".", "?", ";"):
        return not piece.apart_after and (after.is_word or after.is_number)
    return False


def _is_operand(pieces: list[_Piece], symbols: list[bool], place: int) -> bool:
    """Whether a word stands beside a symbol, or as a single letter at a number: `a` in `a = b`, `x` in `2x`."""
    piece, single = pieces[place], len(pieces[place].text) == 1
    for other, apart in ((place - 1, piece.apart_before), (place + 1, piece.apart_after)):
        if 0 <= other < len(pieces):
            if symbols[other] and (single or not apart):
                return True
            if single and pieces[other].is_number and not apart:
                return True
    return False


def _cases(pieces: list[_Piece]) -> tuple[frozenset[str], frozenset[str]]:
    """The words inside sentences that have an upper-case letter, and those that have none."""
    upper, lower = set(), set()
    begins = True
    for piece in pieces:
        if not piece.is_word:
            begins = piece.text in _ENDS or (begins and not piece.is_number)
            continue
        text, plain = piece.text, piece.text.lower()
        acronym = len(text) > 1 and text.isupper()
        titled = text != plain and not acronym
        if plain != "i" and not (titled and (begins or plain in WH)):
            if text != plain:
                upper.add(plain)
            elif not begins:
                lower.add(plain)
        begins = False
    return frozenset(upper), frozenset(lower)
