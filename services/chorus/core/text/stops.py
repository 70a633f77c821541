"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class _Node:
    """A prefix of some stop string. `depth` is its length; `stop` the longest stop string that is a suffix of it."""

    __slots__ = ("children", "depth", "fallback", "stop")

    def __init__(self, depth: int) -> None:
        self.children: dict[str, _Node] = {}
        self.depth = depth
        self.fallback: _Node | None = None
        self.stop: str | None = None


class StopStrings:
    """The automaton of one request's stop strings, shared by its choices (Aho and Corasick's).

    Its node after some text stands for the longest end of that text that begins a stop string, which is exactly what
    must be withheld; so a step costs a dictionary look-up a character however many strings there are.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        """Empty strings are ignored: they would end every choice at once."""
        self.root = _Node(0)
        for string in strings:
            node = self.root
            for character in string:
                node = node.children.setdefault(character, _Node(node.depth + 1))
            if string:
                node.stop = string
        queue = deque((character, child, self.root) for character, child in self.root.children.items())
        while queue:
            character, node, parent = queue.popleft()
            fallback = parent.fallback
            while fallback is not None and character not in fallback.children:
                fallback = fallback.fallback
            node.fallback = self.root if fallback is None else fallback.children[character]
            if node.stop is None:
                node.stop = node.fallback.stop
            queue.extend((below, child, node) for below, child in node.children.items())

    def __bool__(self) -> bool:
        return bool(self.root.children)


class StopMatcher:
    """Passes text on up to the first stop string, withholding what may yet become one.

    The first stop string is the one that ends first, and the longest of those that end there; how the text is cut into
    pieces makes no difference. After a match everything is swallowed.
    """

    def __init__(self, strings: StopStrings) -> None:
        self._strings = strings
        self._node = strings.root
        self._withheld = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Takes new text; returns what is now certain to be part of the answer. Sets `matched` when a stop came."""
        if self.matched is not None:
            return ""
        if not self._strings:
            return text
        node = self._node
        for position, character in enumerate(text):
            while character not in node.children and node.fallback is not None:
                node = node.fallback
            node = node.children.get(character, self._strings.root)
            if node.stop is not None:
                self.matched = node.stop
                self._withheld, text = "", self._withheld + text[: position + 1]
                return text[: len(text) - len(node.stop)]
        self._node = node
        text = self._withheld + text
        certain = len(text) - node.depth
        self._withheld = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """Returns what was withheld: the text ended, so no stop string can come of it any more."""
        text, self._withheld, self._node = self._withheld, "", self._strings.root
        return text
