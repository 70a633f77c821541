"""Whether two answers say the same, for comparing an answer that was kept with a new one. In doubt they don't."""

from __future__ import annotations

import re
from collections import Counter

from chorus.core.cache.words import NEGATORS

_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*")
LEAST = 0.6
"""The share of words that two answers have in common, which differ in wording alone."""


def alike(one: str, other: str) -> bool:
    """Whether two answers have most words, every number and every negation in common."""
    first, second = _words(one), _words(other)
    if first == second:
        return True
    a, b = Counter(first), Counter(second)
    if {word for word in a.keys() ^ b.keys() if word[0].isdigit() or _negates(word)}:
        return False
    return 2 * (a & b).total() >= LEAST * (len(first) + len(second))


def _words(text: str) -> list[str]:
    return [word.lower().replace(",", "") for word in _WORD.findall(text)]


def _negates(word: str) -> bool:
    return word in NEGATORS or word.endswith(("n't", "n’t"))
