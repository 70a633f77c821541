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
