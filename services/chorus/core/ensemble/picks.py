"""Which of two answers, A or B, a judge's words prefer.

It was asked for the letter alone; models add decoration, sentences and reasons. In doubt it is nobody: a pick that was
only guessed would count as much as one that was made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise


def _words(spaced: str) -> frozenset[str]:
    return frozenset(spaced.split())


_LABELS = ("A", "B")
_TOKEN = re.compile(r"[^\W_]+|(?<=\s)[<>](?=\s)|[.,:;!?\n]")
_NOT = re.compile(r"n['’]t\b")
_ENDS_SENTENCE = frozenset(".:;!?\n")
_ENDS_CLAUSE = _ENDS_SENTENCE | _words(", but while whereas however")
# They begin a clause that only says why, or in spite of what; `while` does as a sentence's first word.
_BEGINS_REASON = _words("because since although though while")
# What follows a sentence's first word `A` where it is a label; verbs in -s are besides these.
_AFTER_LABEL = _BEGINS_REASON | _words(
    "b and or nor over than but had did would could should can will must may might for with by in on to of at from if "
    "it which that < >"
)
_NAMES = _words("answer option response choice verdict")
_LISTING = _NAMES | _words("and or nor vs versus")
_BARE = _NAMES | _words("the final my is s")
_BETTER = _words("better over than beats more outperforms superior stronger preferable preferred rather instead to >")
_WORSE = _words(
    "worse worst less weaker inferior poorer wrong incorrect < loses beaten bested outdone outperformed surpassed"
)
_PREFERS = _words(
    "better best prefer prefers preferred preferable choose chose pick picked select selected winner wins favor favour "
    "superior stronger"
)
_UNDECIDED = _words("not neither nor no never cannot hardly unclear equal equally tie whether if depends")


def picked(text: str) -> str:
    """`A` or `B`, whichever the text prefers; empty where it prefers neither, or does not say so plainly."""
    tokens: list[str] = _TOKEN.findall(_NOT.sub(" not", text))
    words = [token for token in tokens if token[0].isalnum()]
    if len(words) == 1 and words[0].upper() in _LABELS:
        return words[0].upper()
    certain, plain, besides = set[str](), set[str](), set[str]()
    for clause in _clauses(tokens):
        label, is_certain = _preferred(clause)
        is_reason = clause[:1] and clause[0] in _BEGINS_REASON
        (besides if is_reason else certain if is_certain else plain).add(label)
    said = (certain - {""}) or (plain - {""}) or (besides - {""})
    return said.pop() if len(said) == 1 else ""


def _clauses(tokens: Sequence[str]) -> Iterator[list[str]]:
    """The words of each clause, in lower case but for labels."""
    clause: list[str] = []
    for place, token in enumerate(tokens):
        word = token.lower()
        if word in _ENDS_CLAUSE or word in _BEGINS_REASON:
            is_first = place == 0 or tokens[place - 1] in _ENDS_SENTENCE
            yield clause
            clause = [word] if word in _BEGINS_REASON and (is_first or word != "while") else []
        else:
            clause.append(token.upper() if _is_label(tokens, place) else word)
    yield clause


def _is_label(tokens: Sequence[str], place: int) -> bool:
    """Whether a token is a label, and no article: that is upper case as a sentence's first word alone."""
    before = tokens[place - 1] if place else "."
    match tokens[place]:
        case "B" | "b":
            return True
        case "a":
            return before.lower() in _NAMES
        case "A" if before not in _ENDS_SENTENCE:
            return True
        case "A":
            rest = (token.lower() for token in tokens[place + 1 : place + 4])
            after = next((word for word in rest if not word.endswith("ly")), ".")
            is_verb = after.endswith("s") and not after.endswith(("ss", "us"))
            return is_verb or after in _AFTER_LABEL or after in _ENDS_CLAUSE
        case _:
            return False


def _preferred(clause: Sequence[str]) -> tuple[str, bool]:
    """The label that a clause is for, empty where it is for none, and whether it says that it is the better one."""
    places = _places(clause)
    words = set(clause)
    if not places or words & _UNDECIDED:
        return "", False
    first, last = places[0], places[-1]
    if clause[first] != clause[last]:
        between = set(clause[first:last])
        if between & _WORSE:
            return clause[last], True
        return (clause[first], True) if between & _BETTER else ("", False)
    if words & _WORSE or (first and clause[first - 1] in ("than", "over")):
        return "", False
    is_bare = words <= _BARE | {clause[first]}
    is_named = bool(words & _PREFERS) or (first > 0 and clause[first - 1] == "is")
    return clause[first], is_bare or is_named


def _places(clause: Sequence[str]) -> list[int]:
    """Where a clause has labels, but for those that are only listed, as in `A or B`."""
    places = [place for place, word in enumerate(clause) if word in _LABELS]
    for one, other in pairwise(places):
        if clause[one] != clause[other] and _LISTING.issuperset(clause[one + 1 : other]):
            return [place for place in places if place not in (one, other)]
    return places
