"""Which of two answers, A or B, a judge's words prefer.

It was asked for the letter alone; models add decoration, sentences and reasons. In doubt it is nobody: a pick that was
only guessed would count as much as one that was made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import dropwhile, pairwise


def _words(spaced: str) -> frozenset[str]:
    return frozenset(spaced.split())


_LABELS = ("A", "B")
_TOKEN = re.compile(r"[^\W_]+|(?<=\s)[<>](?=\s)|[.,:;!?\n]")
_NOT = re.compile(r"n['’]t\b")
_IN_TAGS = re.compile(r"<(\w+)>([^<]*)</\1>")  # <b> is no label
_ENDS_SENTENCE = frozenset(".:;!?\n")
_ENDS_CLAUSE = _ENDS_SENTENCE | _words(", but while whereas however")
# They begin a clause that only says why, or in spite of what; the contrasts do as a sentence's first word.
_BEGINS_REASON = _words("because since although though while whereas")
_OR_CONTRASTS = _words("while whereas")
# What follows a sentence's first word `A` where it is a label; verbs in -s are besides these.
_AFTER_LABEL = _BEGINS_REASON | _words(
    "b and or nor over than but had did would could should can will must may might for with by in on to of at from if "
    "it which that < > compared when where without except beat"
)
# Between the two, as in `A even better than B`, they tell nothing.
_BEFORE_THAT = _words(
    "even much far rather instead ahead better worse stronger weaker superior inferior preferred preferable"
)
_NAMES = _words("answer option response choice verdict")
_LISTING = _NAMES | _words("and or nor vs versus")
_BARE = _NAMES | _words("the final my is s")
_BETTER = _words("better over than beats beat more superior stronger preferable preferred instead ahead >")
_WORSE = _words(
    "worse worst less weaker inferior poorer wrong incorrect < loses loser lost pales yields concedes trails lags "
    "beaten outdone"
)
# With `by` after them they say the opposite.
_OUTDOES = _words(
    "outperforms outperformed surpasses surpassed bested outclassed defeated eclipsed edged trumped topped"
)
_FAULTS = _words(
    "error errors mistake mistakes flaws inaccuracies wrong incorrect inaccurate incomplete vague verbose confusing "
    "misleading irrelevant unhelpful bad nonsense hallucinates fails failed misses omits lacks"
)
_REJECTS = _words("reject eliminate discard dismiss avoid dislike")
_IS = _words("is was been")
_HAS = _IS | _words("has had makes made contains hallucinates fails failed misses omits lacks")
_MORE = _words("more higher")
_FEWER = _words("fewer less lower")
# Neither of two is better by it.
_NEUTRAL = _words("fewer lower longer shorter wordier")
_PREFERS = _words(
    "better best prefer prefers preferred preferable choose chose pick picked select selected winner wins favor favour "
    "superior stronger"
)
_UNDECIDED = _words(
    "not neither nor no never cannot hardly unclear equal equally tie whether if depends almost nearly could"
)


def picked(text: str) -> str:
    """`A` or `B`, whichever the text prefers; empty where it prefers neither, or does not say so plainly."""
    tokens: list[str] = _TOKEN.findall(_NOT.sub(" not", _IN_TAGS.sub(r" \2 ", text)))
    words = [token for token in tokens if token[0].isalnum()]
    if len(words) == 1 and words[0].upper() in _LABELS:
        return words[0].upper()
    certain, plain, besides = set[str](), set[str](), set[str]()
    is_named = False
    for clause in _clauses(tokens):
        label, is_certain = _preferred(clause)
        if not clause or clause[0] not in _BEGINS_REASON:
            (certain if is_certain else plain).add(label)
            is_named = is_named or bool(_places(clause))
        elif is_certain:
            besides.add(label)
    said = (certain - {""}) or (plain - {""}) or (set[str]() if is_named else besides)
    return said.pop() if len(said) == 1 else ""


def _clauses(tokens: Sequence[str]) -> Iterator[list[str]]:
    """The words of each clause, in lower case but for labels; those that only concede, or lead up to another, not."""
    clause: list[str] = []
    leads_up = False
    is_small = all(token == token.lower() for token in tokens)
    for place, token in enumerate(tokens):
        word = token.lower()
        if word in _ENDS_CLAUSE or word in _BEGINS_REASON:
            if not leads_up:
                yield clause
            before = tokens[place - 1].lower() if place else "."
            leads_up = word in _BEGINS_REASON and (before in _ENDS_SENTENCE or before == "even")
            clause = [word] if word in _BEGINS_REASON - _OR_CONTRASTS else []
        else:
            clause.append(token.upper() if _is_label(tokens, place, is_small=is_small) else word)
    if not leads_up:
        yield clause


def _is_label(tokens: Sequence[str], place: int, *, is_small: bool) -> bool:
    """Whether a token is a label, and no article: that is upper case as a sentence's first word alone.

    `is_small`: nothing is upper case.
    """
    before = tokens[place - 1] if place else "."
    match tokens[place]:
        case "B" | "b":
            return True
        case "a" if before.lower() in _NAMES:
            return True
        case "A" if before not in _ENDS_SENTENCE:
            return True
        case "a" if not is_small:
            return False
        case "A" | "a":
            rest = (token.lower() for token in tokens[place + 1 : place + 4])
            after = next((word for word in rest if not word.endswith("ly") and word not in _BEFORE_THAT), ".")
            is_verb = after.endswith("s") and not after.endswith(("ss", "us"))
            return is_verb or after in _AFTER_LABEL or after in _OUTDOES or after in _ENDS_CLAUSE
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
        label = _better(clause, first, last)
        return label, bool(label)
    before = next((word for word in reversed(clause[:first]) if word not in _NAMES), "")
    is_less_at_fault = bool(words & _FEWER and words & _FAULTS)
    if before in ("than", "to", "by") and words & _WORSE and not is_less_at_fault:
        return clause[first], True  # something else is worse than it
    is_at_fault = _FAULTS.intersection(clause[first:]) and not words & _PREFERS and not is_less_at_fault
    is_outdone = words & _OUTDOES and words & _IS
    is_measure = before in ("than", "over") or clause[0] in ("compared", "comparing", "unlike")
    if words & (_WORSE | _REJECTS) or is_at_fault or is_outdone or is_measure:
        return "", False
    is_bare = words <= _BARE | {clause[first]}
    is_named = bool(words & _PREFERS) or (first > 0 and clause[first - 1] == "is")
    return clause[first], is_bare or is_named


def _better(clause: Sequence[str], first: int, last: int) -> str:
    """Which of the two labels at these places is the better one, by what stands between them."""
    between = clause[first:last]
    words = set(between)
    has_fewer, has_more = bool(words & _FEWER), bool(words & _MORE)
    if "than" in words and words & _FAULTS and words & _HAS and (has_fewer or has_more):
        return "" if has_fewer and has_more else clause[first if has_fewer else last]
    if words & _WORSE or "by" in dropwhile(lambda word: word not in _OUTDOES, between):
        return clause[last]
    if words & _NEUTRAL:
        return ""
    is_better = words & (_BETTER | _OUTDOES) or ("to" in words and set(clause) & _PREFERS)
    return clause[first] if is_better else ""


def _places(clause: Sequence[str]) -> list[int]:
    """Where a clause has labels, but for those that are only listed, as in `A or B`."""
    places = [place for place, word in enumerate(clause) if word in _LABELS]
    for one, other in pairwise(places):
        if clause[one] != clause[other] and _LISTING.issuperset(clause[one + 1 : other]):
            return [place for place in places if place not in (one, other)]
    return places
