"""How the gate reads a question: what kind it is, its words in their roles, and all the little words that change it.

No parser: a few rules for English that find the same reading in a question and in most ways to ask it again. Where they
find none, two readings differ, and the gate says no.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from chorus.core.cache.lexicon import Lexicon
from chorus.core.cache.words import (
    ALIKE,
    ASKS,
    AUXILIARY,
    BE,
    CIVIL,
    DEGREE,
    FRAME,
    HANDS_OVER,
    MEASURES,
    MODAL,
    NEGATORS,
    NEUTRAL,
    PARTICLES,
    PHRASES,
    PREPOSITIONS,
    PRONOUNS,
    SAYS,
    SHORT_ENDINGS,
    SHORT_NOT,
    SPEAKERS,
    WH,
    WHAT_IS,
)
from chorus.core.cache.writing import TOKEN, Writing, plain_number, written

_MARKS = frozenset(
    ".!?;:\"“”‘’'()[]…"
)  # punctuation; what of it says something, `writing.py` knows; a comma ends a phrase


@dataclass(frozen=True, slots=True)
class Word:
    """A word that carries meaning. `role` is the preposition that governs it, "?" what is asked for, else empty.

    `place` orders words without a preposition; what `and` joins shares one. `name`: written as one.
    """

    text: str
    role: str = ""
    place: int = 0
    name: bool = False


@dataclass(slots=True)
class Reading:
    """A question as the gate sees it."""

    writing: Writing
    kind: str = ""
    words: list[Word] = field(default_factory=list)
    numbers: list[tuple[str, str]] = field(default_factory=list)  # each with what governs it
    negations: int = 0
    degrees: list[str] = field(default_factory=list)
    modals: list[str] = field(default_factory=list)
    pronouns: list[str] = field(default_factory=list)
    symbols: list[str] = field(default_factory=list)
    tense: str = ""
    passive: bool = False


@dataclass(slots=True)
class _Token:
    text: str
    name: bool = False


def read(question: str, lexicon: Lexicon) -> Reading:
    """Reads a question; never fails, whatever the text."""
    tokens = _unframed(_tokens(question))
    reading = Reading(written(question))
    tokens = _fixed(tokens)
    tokens = _kind(tokens, reading)
    _Reader(reading, lexicon).take(tokens)
    return reading


def _tokens(question: str) -> list[_Token]:
    found: list[_Token] = []
    for text in TOKEN.findall(question):
        if text in _MARKS:
            continue
        name = bool(found) and text[0].isupper() and text != "I"
        lower = text.lower().replace("’", "'")
        head, apostrophe, tail = lower.partition("'")
        if lower == "%":
            found.append(_Token("percent"))
        elif not apostrophe:
            found.append(_Token(plain_number(lower), name))
        elif tail == "t" and head.endswith("n"):
            found += [_Token(SHORT_NOT.get(head, head if head == "can" else head[:-1])), _Token("not")]
        elif tail == "s" and head in SPEAKERS:
            found += [_Token(head, name), _Token("is")]
        elif tail in SHORT_ENDINGS:
            found += [_Token(head, name), _Token(SHORT_ENDINGS[tail])]
        elif tail == "s":
            found += [_Token(head, name), _Token("'s")]
        else:
            found.append(_Token(lower, name))
    return found


def _unframed(tokens: list[_Token]) -> list[_Token]:
    """Without greetings, thanks, and what only asks to be told."""
    while tokens and tokens[-1].text in {"please", "thanks", "thank", ","} | (
        {"you"} if len(tokens) > 1 and tokens[-2].text == "thank" else set()
    ):
        tokens = tokens[:-1]
    start = 0
    while start < len(tokens) and tokens[start].text in FRAME | {","}:
        start += 1
    before = [token.text for token in tokens[:start]]
    after = tokens[start].text if start < len(tokens) else ""
    if after in WH and (ASKS.intersection(before) or not before or set(before) <= CIVIL | {",", "so", "you", "me"}):
        return tokens[start:]
    if after in ("if", "whether") and ASKS.intersection(before):
        return [_Token("?yes"), *tokens[start + 1 :]]
    return _request(tokens)


def _request(tokens: list[_Token]) -> list[_Token]:
    """`Could you please write …` as `write …`; `tell me the …` as `what is the …`."""
    while (
        tokens
        and tokens[0].text in CIVIL | {",", "so", "well", "you", "me"}
        and (tokens[0].text not in ("you", "me") or tokens[0].name is False)
    ):
        if tokens[0].text in ("you", "me") and len(tokens) > 1 and tokens[1].text not in CIVIL | {","}:
            break
        tokens = tokens[1:]
    if len(tokens) > 2 and tokens[0].text in ("can", "could", "would", "will") and tokens[1].text == "you":
        rest = tokens[2:]
        while rest and rest[0].text in CIVIL:
            rest = rest[1:]
        tokens = rest
    texts = [token.text for token in tokens[:3]]
    if len(texts) > 2 and texts[0] in HANDS_OVER and texts[1] in ("me", "us"):
        return [_Token("what"), _Token("is"), *tokens[2:]] if texts[2] == "the" else [tokens[0], *tokens[2:]]
    if texts and texts[0] in WHAT_IS and len(tokens) > 1:
        return [_Token("what"), _Token("is"), *tokens[1:]]
    tokens = [token for place, token in enumerate(tokens) if not (token.text == "me" and place == 1)]
    if len(tokens) > 2 and [token.text for token in tokens[-2:]] == ["for", "me"]:
        tokens = tokens[:-2]
    if len(tokens) > 3 and [token.text for token in tokens[-2:]] == [",", "right"]:
        return [_Token("?yes"), *tokens[:-2]]
    return tokens


_PHRASES_FROM = {
    first: [entry for entry in PHRASES if entry[0][0] == first] for first in {entry[0][0] for entry in PHRASES}
}


def _fixed(tokens: list[_Token]) -> list[_Token]:
    """With each fixed phrase as the words that it stands for."""
    found: list[_Token] = []
    ends: list[_Token] = []
    place = 0
    while place < len(tokens):
        for phrase, instead, end in _PHRASES_FROM.get(tokens[place].text, ()):
            if [token.text for token in tokens[place : place + len(phrase)]] == phrase:
                found += map(_Token, instead)
                ends += map(_Token, end)
                place += len(phrase)
                break
        else:
            found.append(tokens[place])
            place += 1
    return [*found, *ends]


def _kind(tokens: list[_Token], reading: Reading) -> list[_Token]:
    """Notes what kind of question it is; returns the tokens without the words that say so."""
    for place, token in enumerate(tokens):
        opens = place == 0 or tokens[place - 1].text == ","
        if token.text in WH and (opens or place == len(tokens) - 1 or _is_object(tokens, place)):
            rest = tokens[place + 1 :]
            before = tokens[:place]
            if token.text in ("who", "whom", "whose"):
                reading.kind = "who"
                if token.text == "whom":
                    before = [*before, _Token("?agent")]
            elif token.text == "how":
                rest = _how(rest, reading)
            else:
                reading.kind = "what" if token.text == "which" else token.text
                if reading.kind == "what" and rest and not _is_small(rest[0].text):
                    rest = [_Token("?asked"), *rest]
                elif reading.kind == "what" and len(rest) > 1 and rest[-1].text in ("cost", "costs"):
                    reading.kind = "how much"
            return [*rest, *([_Token(",")] if before else []), *before]
    first = tokens[0].text if tokens else ""
    if first in ("?yes", "?can"):
        reading.kind = "yes"
        if first == "?can":
            reading.modals.append("can")
        return tokens[1:]
    if first in AUXILIARY | MODAL or (first == "," and len(tokens) > 1):
        reading.kind = "yes"
        return tokens
    for place, token in enumerate(tokens[:-1]):
        if token.text == "," and tokens[place + 1].text in AUXILIARY | MODAL:
            reading.kind = "yes"
            return [*tokens[place + 1 :], _Token(","), *tokens[:place]]
    reading.kind = "do"
    return [_Token(SAYS.get(first, first)), *tokens[1:]] if tokens else tokens


def _is_object(tokens: list[_Token], place: int) -> bool:
    """Whether a question word stands where its answer would (`Oslo is the capital of which country`)."""
    return place > 1 and tokens[place - 1].text in AUXILIARY | PREPOSITIONS and tokens[place].text in ("which", "what")


def _how(rest: list[_Token], reading: Reading) -> list[_Token]:
    following = rest[0].text if rest else ""
    direct = len(rest) > 1 and rest[1].text in AUXILIARY | MODAL and following not in PRONOUNS and not rest[0].name
    if following not in MEASURES and (not direct or _is_small(following)):
        reading.kind = "how"
        return rest
    reading.kind = f"how {following}"
    if following in ("many", "much") and len(rest) > 1 and not _is_small(rest[1].text):
        return [_Token("?asked"), *rest[1:]]
    return rest[1:]


def _is_small(text: str) -> bool:
    return text in AUXILIARY | MODAL | NEUTRAL | PREPOSITIONS | NEGATORS | PRONOUNS | DEGREE or text == ","


class _Reader:
    """Puts the tokens of one question into its reading."""

    def __init__(self, reading: Reading, lexicon: Lexicon) -> None:
        self._reading = reading
        self._lexicon = lexicon
        self._role = ""
        self._governed = False
        self._place = 0
        self._joined = False
        self._last_role = ""
        self._had: list[str] = []  # auxiliaries

    def take(self, tokens: list[_Token]) -> None:
        agent = None
        for position, token in enumerate(tokens):
            following = tokens[position + 1].text if position + 1 < len(tokens) else ""
            if token.text == "?agent":
                agent = "?"
            elif following == "'s":
                self._word(token, "of")
            else:
                self._token(token)
        self._governs("")
        self._tense()
        self._voice(agent)

    def _token(self, token: _Token) -> None:
        text, reading = token.text, self._reading
        if text in (",", "'s", "and", "?asked"):
            self._governs("?" if text == "?asked" else "")
            self._joined = text == "and"
        elif text in AUXILIARY and not token.name:
            self._had.append(text)
            self._governs("")
        elif text in PREPOSITIONS:
            self._governs(ALIKE.get(text, text))
        elif text in NEGATORS:
            reading.negations += 1
        elif text in MODAL and not token.name:
            reading.modals.append("should" if text == "ought" else text)
        elif text in DEGREE:
            reading.degrees.append(text)
        elif text in PRONOUNS:
            reading.pronouns.append(text)
            self._governed = True
        elif text in NEUTRAL:
            pass
        elif text[0].isdigit():
            reading.numbers.append((text, self._role if self._role != "?" else ""))
            self._governed = True
        elif text[0].isalpha():
            self._word(token, "particle" if text in PARTICLES else self._role)
        else:
            reading.symbols.append(text)

    def _governs(self, role: str) -> None:
        """What governs the next word; a preposition that governs none says something by itself."""
        if self._role not in ("", "?") and not self._governed:
            self._reading.words.append(Word(self._role, "particle", self._place))
        self._role, self._governed = role, False

    def _word(self, token: _Token, role: str) -> None:
        if self._joined and not role:
            role = self._last_role
        elif not self._joined:
            self._place += 1
        self._reading.words.append(Word(token.text, role, self._place, token.name))
        if role != "particle":
            self._last_role, self._role, self._governed = role, "", False
            self._joined = False

    def _tense(self) -> None:
        reading = self._reading
        if not {"did", "was", "were", "had"}.isdisjoint(self._had):
            reading.tense = "past"
        elif not {"will", "shall"}.isdisjoint(self._had):
            reading.tense = "future"
        elif not self._had and any(self._lexicon.is_past(word.text) for word in reading.words):
            reading.tense = "past"
        if not {"can", "could"}.isdisjoint(self._had) and reading.kind == "yes":
            reading.modals.append("can")
        if "would" in self._had and reading.kind == "yes":
            reading.modals.append("would")

    def _voice(self, agent: str | None) -> None:
        """Turns a passive around: who does it, what is done, to whom."""
        reading = self._reading
        if BE.isdisjoint(self._had) and agent != "?":
            return
        plain = [word for word in reading.words if not word.role]
        verbs = [word for word in plain if self._lexicon.is_past(word.text) and not word.name]
        by = [word for word in reading.words if word.role == "by"]
        if not verbs or (len(plain) < 2 and not by) or (verbs[-1] is plain[0] and len(plain) > 1 and not by):
            return
        reading.passive = True
        verb, others = verbs[-1], [word for word in reading.words if word.role]
        order = [*by, verb, *(word for word in plain if word is not verb)]
        placed = [Word(word.text, "", place, word.name) for place, word in enumerate(order)]
        reading.words = [*placed, *(word for word in others if word.role != "by")]
