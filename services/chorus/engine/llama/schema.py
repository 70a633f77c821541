"""Whether a JSON Schema can be compiled in good time: pure, by what stands in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from decimal import Decimal, InvalidOperation
from urllib.parse import unquote

_MOST_KEYS = 3_000  # compiling takes seconds at this many
_DEEPEST = 64
_MOST_MULTIPLE = 10_000  # a multiple of n takes an automaton of n states, and the time of its square
_MOST_PATTERNS = 8  # that one text has to match: each more makes compiling 2.5 times as long, 16 of them 6 seconds


def check_schema(schema: object) -> None:
    """Raises `ValueError` for one that would take too long to compile."""
    keys, multiple = 0, 1
    level: list[object] = [schema]
    for depth in range(_DEEPEST + 1):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                keys += len(value)
                multiple = math.lcm(multiple, _multiple(value.get("multipleOf", 1)))
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below
        if not level:
            break
        if depth == _DEEPEST:
            raise ValueError(f"is nested more than {_DEEPEST} deep")
    if keys > _MOST_KEYS:
        raise ValueError(f"has {keys} keys; at most {_MOST_KEYS} are taken")
    if multiple > _MOST_MULTIPLE:
        raise ValueError(f"a multipleOf, or several together, of more than {_MOST_MULTIPLE} is not supported")
    together = _Patterns(schema).together(schema)
    if together > _MOST_PATTERNS:
        raise ValueError(
            f"asks one text to match up to {together} patterns and formats at once, by allOf, $ref or keys that stand "
            f"together; at most {_MOST_PATTERNS} are taken"
        )


def _multiple(value: object) -> int:
    """A multipleOf without its decimal point."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 1  # not valid, which the compiler will say
    try:
        digits = Decimal(repr(value)).normalize().as_tuple()
    except InvalidOperation:
        return 1
    exponent = digits.exponent if isinstance(digits.exponent, int) else 0
    if abs(exponent) > 9:
        raise ValueError(f"a multipleOf of {value} is not supported")
    whole = int("".join(map(str, digits.digits)))
    return max(whole * int(10 ** max(exponent, 0)), 1)


class _Patterns:
    """How many of a schema's patterns and formats can meet in one text. llguidance refuses to follow a reference back
    to where it began when other keys stand beside it, so what is met on the way down once is all there is."""

    def __init__(self, root: object) -> None:
        self._root = root
        dicts = list(_dicts(root))
        self._all = sum(_own(part) for part in dicts)
        self._renames = any("$id" in part for part in dicts)  # then a reference may mean another place
        self._found: dict[int, int] = {}  # by the part's id; 0 while it is looked at

    def together(self, part: object) -> int:
        """At most so many meet in one text that this part of the schema describes, or in one below it."""
        if not isinstance(part, dict):
            return 0
        if id(part) in self._found:
            return self._found[id(part)]
        self._found[id(part)] = 0
        own = _own(part)
        own += sum(self._referred(part[key]) for key in ("$ref", "$dynamicRef") if key in part)
        own += sum(map(self.together, _parts(part.get("allOf"))))
        own += sum(self._most(_parts(part.get(key))) for key in ("anyOf", "oneOf"))
        own += sum(self.together(part.get(key)) for key in ("if", "then", "else", "not"))
        # A property may be told of by its name, by patterns of names and as one of all others.
        named = [self._most(_parts(part.get(key))) for key in ("properties", "patternProperties")]
        below = sum(named) + self.together(part.get("additionalProperties"))
        items = part.get("items")
        each = self._most(_parts(part.get("prefixItems")))
        each += self._most(items) if isinstance(items, list) else self.together(items)
        others = [part.get(key) for key in ("additionalItems", "contains", "propertyNames", "unevaluatedProperties")]
        # What is below here meets what is below the parts that `own` counts.
        self._found[id(part)] = own + max(below, each, self._most(others))
        return self._found[id(part)]

    def _most(self, parts: Iterable[object]) -> int:
        return max(map(self.together, parts), default=0)

    def _referred(self, reference: object) -> int:
        """`together` of what a reference stands for; where only the compiler can tell, all that there are."""
        if self._renames or not isinstance(reference, str) or not f"{reference}/".startswith("#/"):
            return self._all
        part = self._root
        for key in unquote(reference[1:]).split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(part, dict):
                part = part.get(key)
            elif isinstance(part, list) and key.isdigit() and int(key) < len(part):
                part = part[int(key)]
            else:
                return self._all
        return self.together(part)


def _own(part: dict[str, object]) -> int:
    return ("pattern" in part) + ("format" in part)


def _dicts(part: object) -> Iterator[dict[str, object]]:
    if isinstance(part, dict):
        yield part
    for below in _parts(part):
        yield from _dicts(below)


def _parts(value: object) -> list[object]:
    """The schemas of a list, or of an object that gives each a name."""
    if isinstance(value, list):
        return value
    return list(value.values()) if isinstance(value, dict) else []
