"""Words that are the same word: inflected forms, and synonyms whose commonest meaning is one and the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

_VOWELS = frozenset("aeiou")
_SHORTEST = 3  # letters that an inflected word's stem has at least


class Lexicon:
    """What is known of English words; the lines are those of lexicon.txt: `= synonyms`, `~ form lemma`, `# comment`."""

    def __init__(self, lines: Iterable[str]) -> None:
        """Raises ValueError for a line of another kind."""
        # Tuples, since the garbage collector would come by each of so many sets every time.
        self._groups: dict[str, tuple[int, ...]] = defaultdict(tuple)
        self._irregular: dict[str, tuple[str, ...]] = defaultdict(tuple)
        for number, line in enumerate(lines):
            kind, *words = line.split() or ["#"]
            if kind == "=":
                for word in words:
                    self._groups[word] += (number,)
            elif kind == "~":
                self._irregular[words[0]] += (words[1],)
            elif not kind.startswith("#"):
                raise ValueError(f"line {number + 1} of the lexicon is neither synonyms (=) nor a form (~)")

    def stems(self, word: str) -> frozenset[str]:
        """The word and all that it may be a form of."""
        return frozenset({word, *self._irregular.get(word, ()), *_regular(word)})

    def is_past(self, word: str) -> bool:
        """Whether it may be a verb's past or participle."""
        if word.endswith("ed") and len(word) > _SHORTEST + 1:
            return True
        return word in self._irregular and not word.endswith(("ing", "s"))

    def inflected(self, one: str, other: str) -> bool:
        """Whether both are forms of one word."""
        return one == other or not self.stems(one).isdisjoint(self.stems(other))

    def synonymous(self, one: str, other: str) -> bool:
        """Whether some form of one is a synonym of some form of the other."""
        groups = self._groups_of(one)
        return bool(groups) and not groups.isdisjoint(self._groups_of(other))

    def _groups_of(self, word: str) -> set[int]:
        return {group for stem in self.stems(word) for group in self._groups.get(stem, ())}


def _regular(word: str) -> Iterable[str]:
    for ending, replacements in _ENDINGS.items():
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= _SHORTEST:
            for replacement in replacements:
                yield stem + replacement
            if len(ending) > 1 and stem[-1] == stem[-2] and stem[-1] not in _VOWELS:
                yield stem[:-1]


_ENDINGS = {
    "s": ("",),
    "es": ("",),
    "ies": ("y",),
    "ed": ("", "e"),
    "ied": ("y",),
    "ing": ("", "e"),
}
