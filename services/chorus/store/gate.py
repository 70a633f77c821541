"""The gate as it comes with the package: its lexicon and its learned weights."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from chorus.core.cache.gate import Gate, Weights
from chorus.core.cache.lexicon import Lexicon

_FOLDER = "chorus.core.cache"


@cache
def read_lexicon() -> Lexicon:
    """The lexicon; read once."""
    return Lexicon((files(_FOLDER) / "lexicon.txt").read_text(encoding="utf-8").splitlines())


@cache
def read_gate() -> Gate:
    """The gate; read once."""
    return Gate(read_lexicon(), Weights.parse((files(_FOLDER) / "gate.json").read_text(encoding="utf-8")))
