"""What a check found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How good or bad it is."""

    OK = "ok"
    WARN = "warn"  # works, and could be better or soon be worse
    FAIL = "fail"  # something that Chorus needs does not work


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report. `advice` says what to do; empty where there is nothing to do."""

    check: str
    level: Level
    message: str
    advice: str = ""


Findings = Iterator[Finding]


def ok(check: str, message: str, advice: str = "") -> Finding:
    """A good one."""
    return Finding(check, Level.OK, message, advice)


def warn(check: str, message: str, advice: str) -> Finding:
    """A doubtful one; it always comes with advice."""
    return Finding(check, Level.WARN, message, advice)


def fail(check: str, message: str, advice: str) -> Finding:
    """A bad one; it always comes with advice."""
    return Finding(check, Level.FAIL, message, advice)
