"""Answers compared: what is left of one when form is taken away, whether two say the same, how alike they are."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

SameAnswer = Callable[[str, str], bool]
Similarity = Callable[[str, str], float]

_LEAD_IN = re.compile(r"^(?:the\s+)?(?:final\s+)?answer\s*(?:is|:)\s*", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
# Characters that aren't seen, and those that are written in several ways.
_ONE_FORM = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff\ufe0e\ufe0f")) | str.maketrans(
    "\u2212\u2010\u2011\u2019\u00b4", "---''"
)
# NFKC would make 102 of ten squared.
_RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u207f]+")
_LINE_HEAD = re.compile(r"^[ \t]*(?:#{1,6}[ \t]+|[*•][ \t]+|[-+][ \t]+(?=[^\W\d_]{2}))", re.MULTILINE)
_FENCE = re.compile(r"`{3,}|-{3,}|\*{3,}|_{3,}|\\[()\[\]]")
_EMPHASIS = re.compile(r"[*`$]+|(?<!_)_(?!_)")
_DASH = re.compile(r"\u2013(?=\d)")
_HYPHEN = re.compile(
    r"(?<=[^\W\d_]{2}) ?-+ ?(?=[^\W\d_]{2})|(?<=[^\W\d_])-+(?=[^\W\d_]{2})|(?<=[^\W\d_]{2})-+(?=[^\W\d_])"
)
# A colon in a time, a point in a number and a mark of negation say something.
_PUNCTUATION = re.compile(
    r"[\"',;?¿¡“”„‟‘‚‛«»‹›•‣—―‒–。、।॥،؛؟۔「」『』【】《》〈〉〔〕]|:(?!\d)|(?<!\d):|\.(?!\d)|!(?![=\w(])|(?<=\w)!(?!=)"
)
_CALCULATES = re.compile("[-+*/=<>^\u00d7\u00f7\u00b1\u2190-\u23ff]")
_BRACKET = re.compile(r"(?<!\w)[(\[{]|[(\[{](?!\w)|[)\]}]")
# All symbols but the sign of a number.
_SYMBOL = re.compile(
    r"(?<=[\w)\]}%])[-+]|[-+](?!\.?\d)|[*/=<>^%&|~#@$\\!(){}\[\]\u00ac\u00b1\u00d7\u00f7\u2190-\u23ff]"
)


@lru_cache(maxsize=256)  # each answer is compared with all others, as often as one comes in
def normalise(text: str) -> str:
    """The words and symbols of an answer, in lower case, each by itself, without what is form alone: a lead-in, markup,
    punctuation, the commas in numbers, the ways that Unicode has of writing the same. In doubt something isn't."""
    return _normalised(text)


def _normalised(text: str) -> str:
    text = unicodedata.normalize("NFKC", _RAISED.sub(r"^\g<0>", text.translate(_ONE_FORM))).translate(_ONE_FORM)
    text = _without_emphasis(_FENCE.sub(" ", _LINE_HEAD.sub("", text))).strip()
    text = unicodedata.normalize("NFKC", _LEAD_IN.sub("", text).casefold())
    text = " ".join(_DASH.sub("-", _THOUSANDS.sub("", text)).split())
    text = _PUNCTUATION.sub(" ", _HYPHEN.sub(" ", text))
    if not _CALCULATES.search(text):
        text = _BRACKET.sub(" ", text)
    return " ".join(_SYMBOL.sub(r" \g<0> ", text).split())


def _without_emphasis(text: str) -> str:
    """Without the marks of markdown and TeX around words: those alone that are closed again."""
    opened: dict[str, re.Match[str]] = {}
    dropped: list[tuple[int, int]] = []
    for mark in _EMPHASIS.finditer(text):
        before, after = text[mark.start() - 1 : mark.start()] or " ", text[mark.end() : mark.end() + 1] or " "
        if mark[0] in opened and not before.isspace() and not after.isalnum():
            dropped += [opened.pop(mark[0]).span(), mark.span()]
        elif not before.isalnum() and not after.isspace():
            opened[mark[0]] = mark
    kept, at = [], 0
    for start, end in sorted(dropped):
        kept.append(text[at:start])
        at = end
    return "".join((*kept, text[at:]))


def same_answer(first: str, second: str) -> bool:
    """Whether two answers say the same: equal but for their form. Two empty ones don't: neither says anything."""
    words = normalise(first)
    return bool(words) and words == normalise(second)


def similarity(first: str, second: str) -> float:
    """How alike two answers are, 0 to 1: twice the words in common over all words (Dice, on multisets)."""
    one, other = _words(first), _words(second)
    total = len(one) + len(other)
    return 2.0 * len(one & other) / total if total else 0.0


@lru_cache(maxsize=64)  # as many as are compared pair by pair in one verdict
def _words(text: str) -> frozenset[str]:
    """A text's words, each further time that one occurs as a word of its own."""
    seen: Counter[str] = Counter()
    words = []
    for word in normalise(text).split():
        words.append(f"{word} {seen[word]}")
        seen[word] += 1
    return frozenset(words)


def support(text: str, drafts: Sequence[str], weights: Sequence[float], *, by_any: bool = False) -> float:
    """How much of a text its drafts say, too, 0 to 1: of each sentence the share of words that a draft has (none where
    the draft lacks one of its numbers), weighted over drafts, and by words over sentences.

    `by_any`: what one draft says is enough. Words alone are compared: a text that denies its drafts in their own words
    isn't found out.
    """
    sentences = [words for part in _SENTENCE_END.split(text) if (words := _normalised(part).split())]
    told = [frozenset(normalise(draft).split()) for draft in drafts]
    total = sum(weights)
    if not sentences or not told or total <= 0.0:
        return 0.0

    def of(sentence: Sequence[str]) -> float:
        numbers = [word for word in sentence if any(map(str.isdigit, word))]
        shares = [_said(sentence, numbers, draft) for draft in told]
        if by_any:
            return max(shares)
        return sum(share * weight for share, weight in zip(shares, weights, strict=True)) / total

    return min(1.0, sum(len(sentence) * of(sentence) for sentence in sentences) / sum(map(len, sentences)))


def _said(sentence: Sequence[str], numbers: Sequence[str], draft: Collection[str]) -> float:
    if not all(number in draft for number in numbers):
        return 0.0
    return sum(word in draft for word in sentence) / len(sentence)


def clusters(texts: Sequence[str], same: SameAnswer) -> list[list[int]]:
    """Indexes of texts that say the same as the first of their cluster, the greatest cluster first."""
    found: list[list[int]] = []
    for index, text in enumerate(texts):
        for cluster in found:
            if same(texts[cluster[0]], text):
                cluster.append(index)
                break
        else:
            found.append([index])
    return sorted(found, key=lambda cluster: (-len(cluster), cluster[0]))
