"""Whether two answers say the same, for comparing an answer that was kept with a new one. In doubt they don't."""

from __future__ import annotations

import re
from collections import Counter

from chorus.core.cache.words import NEGATORS
from chorus.core.cache.writing import formula

_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*")
_BOLD = re.compile(r"\*\*(\S(?:.*?\S)?)\*\*")
_LAYOUT = re.compile(r"^[ \t]*(?:[-*+•>]|#+)[ \t]+", re.MULTILINE)
LEAST = 0.6
"""The share of words that two answers have in common, which differ in wording alone."""


def alike(one: str, other: str) -> bool:
    """Whether two answers have most words, every negation, and all numbers and symbols in their order in common."""
    if formula(_unmarked(one)) != formula(_unmarked(other)):
        return False
    first, second = _words(one), _words(other)
    if first == second:
        return True
    a, b = Counter(first), Counter(second)
    if any(_negates(word) for word in a.keys() ^ b.keys()):
        return False
    return 2 * (a & b).total() >= LEAST * (len(first) + len(second))


def _unmarked(text: str) -> str:
    """Without Markdown's bullets, headings and bold type, which are symbols and say nothing."""
    return _LAYOUT.sub("", _BOLD.sub(r"\1", text))


def _words(text: str) -> list[str]:
    return [word.lower().replace(",", "") for word in _WORD.findall(text)]


def _negates(word: str) -> bool:
    return word in NEGATORS or word.endswith(("n't", "n’t"))
