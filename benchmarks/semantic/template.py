"""Pairs of questions out of templates: slots filled by a generator with a fixed seed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_SLOT = re.compile(r"\{([a-z]+)(2?)\}")


@dataclass(frozen=True)
class Template:
    """A question with `{slots}`; `same` and `near` by kind. `{x2}` is another value of slot `x` than `{x}`."""

    name: str
    base: str
    slots: Mapping[str, Sequence[str]]
    same: Mapping[str, Sequence[str]]
    near: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Pair:
    """Two questions; `same`: one answer serves both. `kind` is how the second was made from the first."""

    template: str
    kind: str
    same: bool
    first: str
    second: str


def pairs(templates: Iterable[Template], *, fillings: int, seed: int) -> list[Pair]:
    """All pairs of each template, its slots filled `fillings` times (fewer where there are not so many ways).

    Half of the first questions of near misses, and of paraphrases, are the base; the others are another paraphrase, so
    that what is compared differs in form, too. No pair comes twice, in either order.
    """
    rng = random.Random(seed)
    found: dict[tuple[str, str], Pair] = {}
    for template in templates:
        ways = [text for texts in template.same.values() for text in texts]
        for _ in range(fillings):
            values = {name: rng.sample(list(options), 2) for name, options in template.slots.items()}
            for same, kinds in ((True, template.same), (False, template.near)):
                for kind, texts in kinds.items():
                    for text in texts:
                        others = [way for way in ways if way != text]
                        first = template.base if rng.random() < 0.5 or not others else rng.choice(others)
                        pair = Pair(template.name, kind, same, _filled(first, values), _filled(text, values))
                        key = (min(pair.first, pair.second), max(pair.first, pair.second))
                        if pair.first != pair.second:
                            found.setdefault(key, pair)
    return list(found.values())


def _filled(text: str, values: Mapping[str, Sequence[str]]) -> str:
    filled = _SLOT.sub(lambda slot: values[slot[1]][1 if slot[2] else 0], text)
    return filled[0].upper() + filled[1:]
