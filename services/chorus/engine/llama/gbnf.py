"""llama.cpp's grammar notation (GBNF), translated into the Lark dialect that llguidance reads.

A grammar without recursion is one regular expression, and is matched exactly. In one with recursion, the parts without
it are read as lexemes, each as long as it can be: what is generated is always a text of the grammar, but where a text
could be cut into lexemes in another way (`[a-z]+ "b"`), not every text of the grammar can come.

The notation: `name ::= ...`, "literals", [classes], `.`, (groups), `|`, `*`, `+`, `?`, `{n}`, `{n,}`, `{n,m}`, and
`#` comments; the root rule is `root`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_DEEPEST = 64
_LONGEST = 1_000_000  # characters of the translation
_TOKEN = re.compile(
    r"""(?P<space>[ \t]+|\#[^\r\n]*)|(?P<line>\r\n|\r|\n)|(?P<define>::=)|(?P<name>[A-Za-z0-9_-]+)
    |(?P<literal>"(?:[^"\\]|\\.)*")|(?P<class>\[(?:[^\]\\]|\\.)*\])|(?P<repeat>[*+?]|\{\s*\d+\s*(?:,\s*\d*\s*)?\})
    |(?P<mark>[.()|])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))|(.)", re.DOTALL)
_PLAIN = {"n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True, slots=True)
class _Text:
    """A literal."""

    text: str


@dataclass(frozen=True, slots=True)
class _Class:
    """One character, as a class of a regular expression."""

    regex: str


@dataclass(frozen=True, slots=True)
class _Name:
    name: str


@dataclass(frozen=True, slots=True)
class _Group:
    """Parts one after the other, or `either` of them."""

    parts: tuple[_Node, ...]
    either: bool


@dataclass(frozen=True, slots=True)
class _Repeat:
    part: _Node
    suffix: str


_Node = _Text | _Class | _Name | _Group | _Repeat


def to_lark(source: str) -> str:
    """The grammar in Lark. Raises `ValueError` where it is none, saying where."""
    rules = _Parser(source).rules()
    if "root" not in rules:
        raise ValueError("has no rule named root")
    for name, node in rules.items():
        for used in _names(node):
            if used not in rules:
                raise ValueError(f"the rule {name} uses {used}, which is not defined")
    return _Writer(rules).grammar()


class _Parser:
    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens: list[tuple[str, str, int]] = []
        place = 0
        while place < len(source):
            match = _TOKEN.match(source, place)
            if match is None:
                raise ValueError(f"{self._where(place)}: {source[place]!r} is not understood here")
            kind = match.lastgroup or ""
            if kind != "space":
                self._tokens.append((kind, match.group(), place))
            place = match.end()
        self._tokens.append(("end", "", len(source)))
        self._place = 0
        self._depth = 0

    def rules(self) -> dict[str, _Node]:
        found: dict[str, _Node] = {}
        self._skip_lines()
        while self._kind != "end":
            name = self._take("name")
            self._take("define")
            self._skip_lines()
            found[name] = self._choices(nested=False)
            if self._kind != "end":
                self._take("line")
            self._skip_lines()
        return found

    def _choices(self, *, nested: bool) -> _Node:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError(f"{self._here}: is nested more than {_DEEPEST} deep")
        choices = [self._sequence(nested=nested)]
        while self._text == "|":
            self._place += 1
            self._skip_lines()
            choices.append(self._sequence(nested=nested))
        self._depth -= 1
        return choices[0] if len(choices) == 1 else _Group(tuple(choices), either=True)

    def _sequence(self, *, nested: bool) -> _Node:
        parts: list[_Node] = []
        while True:
            if nested:
                self._skip_lines()
            kind, text, _ = self._tokens[self._place]
            if kind == "repeat" and parts:
                parts[-1] = _Repeat(parts[-1], _suffix(text))
            elif kind == "literal":
                parts.append(_Text(_unescaped(text[1:-1])))
            elif kind == "class":
                parts.append(_Class(_class(text[1:-1])))
            elif text == ".":
                parts.append(_Class(r"(?s:.)"))
            elif kind == "name" and self._tokens[self._place + 1][0] != "define":
                parts.append(_Name(text))
            elif text == "(":
                self._place += 1
                parts.append(self._choices(nested=True))
                self._skip_lines()
                if self._text != ")":
                    raise ValueError(f"{self._here}: a ) is missing")
            else:
                break
            self._place += 1
        return parts[0] if len(parts) == 1 else _Group(tuple(parts), either=False)

    @property
    def _kind(self) -> str:
        return self._tokens[self._place][0]

    @property
    def _text(self) -> str:
        return self._tokens[self._place][1]

    @property
    def _here(self) -> str:
        return self._where(self._tokens[self._place][2])

    def _where(self, place: int) -> str:
        return f"line {self._source.count(chr(10), 0, place) + 1}"

    def _take(self, kind: str) -> str:
        if self._kind != kind:
            wanted = {"name": "the name of a rule", "define": "::=", "line": "the end of the rule"}[kind]
            raise ValueError(f"{self._here}: {wanted} is expected, not {self._text[:20]!r}")
        self._place += 1
        return self._tokens[self._place - 1][1]

    def _skip_lines(self) -> None:
        while self._kind == "line":
            self._place += 1


class _Writer:
    """Writes rules as Lark: those without recursion, and such parts of others, as regular expressions."""

    def __init__(self, rules: dict[str, _Node]) -> None:
        self._rules = rules
        self._recursive = _recursive(rules)
        self._regexes: dict[str, str] = {}
        self._lark = {name: f"r{number}" for number, name in enumerate(rules)}
        self._size = 0

    def grammar(self) -> str:
        if "root" not in self._recursive:
            return f"start: {self._rule(_Name('root'))}\n"
        lines = [f"start: {self._lark['root']}"]
        lines += [f"{self._lark[name]}: {self._rule(self._rules[name])}" for name in self._recursive]
        return self._checked("\n".join(lines) + "\n")

    def _rule(self, node: _Node) -> str:
        if self._is_regular(node):
            if isinstance(node, _Text):
                return json.dumps(node.text)
            regex = self._checked(self._regex(node))
            return f"/{regex}/" if regex else '""'  # two slashes begin a comment
        if isinstance(node, _Name):
            return self._lark[node.name]
        if isinstance(node, _Repeat):
            return f"({self._rule(node.part)}){node.suffix}"
        assert isinstance(node, _Group)
        if node.either:
            return "(" + " | ".join(map(self._rule, node.parts)) + ")"
        return " ".join(map(self._rule, node.parts)) or '""'

    def _is_regular(self, node: _Node) -> bool:
        return not any(name in self._recursive for name in _names(node))

    def _regex(self, node: _Node) -> str:
        if isinstance(node, _Text):
            return "".join(map(_escaped, node.text))
        if isinstance(node, _Class):
            return node.regex
        if isinstance(node, _Name):
            if node.name not in self._regexes:
                self._regexes[node.name] = self._checked(f"(?:{self._regex(self._rules[node.name])})")
            return self._regexes[node.name]
        if isinstance(node, _Repeat):
            return f"(?:{self._regex(node.part)}){node.suffix}"
        joined = ("|" if node.either else "").join(map(self._regex, node.parts))
        return self._checked(f"(?:{joined})" if node.either else joined)

    def _checked(self, text: str) -> str:
        self._size += len(text)
        if self._size > _LONGEST:
            raise ValueError("is too large once its rules are put into each other")
        return text


def _names(node: _Node) -> set[str]:
    if isinstance(node, _Name):
        return {node.name}
    if isinstance(node, _Repeat):
        return _names(node.part)
    if isinstance(node, _Group):
        return set().union(*map(_names, node.parts))
    return set()


def _recursive(rules: dict[str, _Node]) -> dict[str, None]:
    """The rules that use themselves, or that use one which does, in order."""
    uses = {name: _names(node) for name, node in rules.items()}
    # Rules whose every use is regular are taken away until none is left to take; what remains is recursive.
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, used in uses.items():
        for other in used:
            users[other].append(name)
    waiting = {name: len(used) for name, used in uses.items()}
    free = [name for name, count in waiting.items() if not count]
    regular = set()
    while free:
        name = free.pop()
        regular.add(name)
        for user in users[name]:
            waiting[user] -= 1
            if not waiting[user]:
                free.append(user)
    return {name: None for name in rules if name not in regular}


def _suffix(text: str) -> str:
    if not text.startswith("{"):
        return text
    bounds = [bound.strip() for bound in text[1:-1].split(",")]
    if any(len(bound) > 9 for bound in bounds) or (len(bounds) == 2 and bounds[1] and int(bounds[0]) > int(bounds[1])):
        raise ValueError(f"{text} is no range of repeats")
    return "{" + ",".join(bounds) + "}"


def _character(match: re.Match[str]) -> tuple[str, bool]:
    """A character of a literal or a class, and whether it was escaped."""
    code = match.group(1) or match.group(2) or match.group(3)
    if code:
        number = int(code, 16)
        if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
            raise ValueError(f"{match.group()} is no character")
        return chr(number), True
    if match.group(4):
        if match.group(4) not in '"\\[]nrt-^':
            raise ValueError(f"{match.group()} is no escape")
        return _PLAIN.get(match.group(4), match.group(4)), True
    return match.group(5), False


def _unescaped(body: str) -> str:
    return "".join(_character(match)[0] for match in _ESCAPE.finditer(body))


def _class(body: str) -> str:
    """A class in the notation of regular expressions, with every character in it escaped."""
    negated = body.startswith("^")
    characters = [_character(match) for match in _ESCAPE.finditer(body[negated:])]
    if not characters:
        raise ValueError("[] holds no character" if not negated else "[^] excludes no character")
    parts: list[str] = []
    place = 0
    while place < len(characters):
        first = characters[place][0]
        if place + 2 < len(characters) and characters[place + 1] == ("-", False):
            last = characters[place + 2][0]
            if last < first:
                raise ValueError(f"{first}-{last} is no range of characters")
            parts.append(f"{_escaped(first)}-{_escaped(last)}")
            place += 3
        else:
            parts.append(_escaped(first))
            place += 1
    return f"[{'^' if negated else ''}{''.join(parts)}]"


def _escaped(character: str) -> str:
    return character if character.isascii() and character.isalnum() else f"\\x{{{ord(character):x}}}"
