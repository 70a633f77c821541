"""Answers compared: what is left of one when form is taken away, whether two say the same, how alike they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

SameAnswer = Callable[[str, str], bool]
Similarity = Callable[[str, str], float]

_LEAD_IN = re.compile(r"^(?:the\s+)?(?:final\s+)?answer\s*(?:is|:)\s*", re.IGNORECASE)
_NOT_A_WORD = re.compile(r"[^\w.+-]+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_LOOSE_MARK = re.compile(r"[.+-](?!\d)")


def normalise(text: str) -> str:
    """The words of an answer, in lower case, without a lead-in, punctuation and the commas in numbers."""
    text = _THOUSANDS.sub("", _LEAD_IN.sub("", text.strip()).casefold())
    return " ".join(_LOOSE_MARK.sub(" ", _NOT_A_WORD.sub(" ", text)).split())


def same_answer(first: str, second: str) -> bool:
    """Whether two answers say the same: equal but for their form. Two empty ones don't: neither says anything."""
    words = normalise(first)
    return bool(words) and words == normalise(second)


def similarity(first: str, second: str) -> float:
    """How alike two answers are, 0 to 1: twice the words in common over all words (Dice, on multisets)."""
    one, other = Counter(normalise(first).split()), Counter(normalise(second).split())
    total = one.total() + other.total()
    return 2.0 * (one & other).total() / total if total else 0.0


def support(text: str, drafts: Sequence[str], weights: Sequence[float], *, by_any: bool = False) -> float:
    """How much of a text its drafts say, too, 0 to 1: of each sentence the share of words that a draft has (none where
    the draft lacks one of its numbers), weighted over drafts, and by words over sentences.

    `by_any`: what one draft says is enough. Words alone are compared: a text that denies its drafts in their own words
    isn't found out.
    """
    sentences = [Counter(words.split()) for part in _SENTENCE_END.split(text) if (words := normalise(part))]
    told = [Counter(normalise(draft).split()) for draft in drafts]
    total = sum(weights)
    if not sentences or not told or total <= 0.0:
        return 0.0

    def of(sentence: Counter[str]) -> float:
        shares = [_said(sentence, draft) for draft in told]
        if by_any:
            return max(shares)
        return sum(share * weight for share, weight in zip(shares, weights, strict=True)) / total

    return min(1.0, sum(sentence.total() * of(sentence) for sentence in sentences) / sum(map(Counter.total, sentences)))


def _said(sentence: Counter[str], draft: Counter[str]) -> float:
    if any(word not in draft for word in sentence if any(map(str.isdigit, word))):
        return 0.0
    return sum(count for word, count in sentence.items() if word in draft) / sentence.total()


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
