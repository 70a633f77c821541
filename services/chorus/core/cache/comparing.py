"""What differs between two questions, as numbers that the gate weighs; all zero for one question asked twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from chorus.core.cache.lexicon import Lexicon
from chorus.core.cache.reading import Reading, Word

FEATURES = (
    "kind",  # what is asked for: what, who, when, how many, whether, to do something
    "words",  # words of either question that have no like in the other
    "roles",  # words that a preposition governs in one and another, or none, in the other
    "order",  # pairs of words that stand the other way round
    "numbers",
    "negation",
    "degrees",  # all, only, more, first, …
    "modals",  # should, must, may, can
    "tense",
    "pronouns",
    "symbols",
    "voice",  # one in the passive
    "synonyms",  # words that are alike, but not the same word
    "names",  # names without a like
    "differences",  # all of the above that are not harmless by themselves, together
    "distance",  # 1 - cosine of the embeddings
)
_HARMLESS = frozenset({"voice", "synonyms", "pronouns", "names"})
_MOST = 3.0  # of one kind; more says no more


def differences(one: Reading, other: Reading, lexicon: Lexicon, cosine: float) -> tuple[float, ...]:
    """The features, in their order. `cosine` is that of the questions' embeddings, from -1 to 1."""
    aligned, alone = _align(one.words, other.words, lexicon)
    return _features(
        _seen_at_once(one, other, cosine)
        | {
            "words": float(len(alone)),
            "names": float(sum(word.name for word in alone)),
            "roles": float(sum(a.role != b.role for a, b, _ in aligned)),
            "order": float(_inversions([(a.place, b.place) for a, b, _ in aligned if not a.role and not b.role])),
            "synonyms": float(sum(not same for _, _, same in aligned)),
        }
    )


def least_differences(one: Reading, other: Reading, cosine: float) -> tuple[float, ...]:
    """What the features are at least: those that are seen without aligning words, which takes longest."""
    return _features(_seen_at_once(one, other, cosine))


def _seen_at_once(one: Reading, other: Reading, cosine: float) -> dict[str, float]:
    return {
        "kind": float(one.kind != other.kind),
        "numbers": _apart(one.numbers, other.numbers),
        "negation": float(one.negations != other.negations),
        "degrees": _apart(one.degrees, other.degrees),
        "modals": float(sorted(one.modals) != sorted(other.modals)),
        "tense": float(one.tense != other.tense),
        "pronouns": float(one.pronouns != other.pronouns),
        "symbols": _apart(one.symbols, other.symbols),
        "voice": float(one.passive != other.passive),
        "distance": 1.0 - max(-1.0, min(1.0, cosine)),
    }


def _features(found: dict[str, float]) -> tuple[float, ...]:
    found["differences"] = sum(
        min(value, _MOST) for name, value in found.items() if name not in _HARMLESS and name != "distance"
    )
    return tuple(min(found.get(name, 0.0), _MOST) for name in FEATURES)


def _align(
    ones: Sequence[Word], others: Sequence[Word], lexicon: Lexicon
) -> tuple[list[tuple[Word, Word, bool]], list[Word]]:
    """Pairs of words that are alike, each with whether they are one word, and the words that are left over.

    The surest pairs first: the same word in the same role, then in another one, then another form, then a synonym.
    """
    left, right = list(ones), list(others)
    pairs: list[tuple[Word, Word, bool]] = []
    for level in range(5):
        for one in tuple(left):
            for other in right:
                if _alike(one, other, level, lexicon):
                    pairs.append((one, other, level < 4))
                    left.remove(one)
                    right.remove(other)
                    break
    return pairs, [*left, *right]


def _alike(one: Word, other: Word, level: int, lexicon: Lexicon) -> bool:
    if level == 0:
        return one.text == other.text and one.role == other.role
    if level == 1:
        return one.text == other.text
    if one.name or other.name:
        return False  # a name is no form and no synonym of anything
    if level == 2:
        return one.role == other.role and lexicon.inflected(one.text, other.text)
    if level == 3:
        return lexicon.inflected(one.text, other.text)
    return lexicon.synonymous(one.text, other.text)


def _inversions(places: Sequence[tuple[int, int]]) -> int:
    return sum((a - c) * (b - d) < 0 for number, (a, b) in enumerate(places) for c, d in places[number + 1 :])


def _apart(ones: Sequence[object], others: Sequence[object]) -> float:
    """How many things of two bags are in one of them alone."""
    if ones == others:
        return 0.0
    first, second = Counter(ones), Counter(others)
    return float(((first - second) + (second - first)).total())
