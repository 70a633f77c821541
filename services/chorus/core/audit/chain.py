"""The chain: each entry is one line of JSON that holds the SHA-256 of the line before it.

Whoever changes, takes out, puts in or moves a line breaks the link of the next one. The last line has no next one, so
the head (its number and SHA-256) is kept beside the lines; `known`, a head that was noted elsewhere, finds whoever
wrote the lines and the head anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from chorus.core.audit.deeds import Deed
from chorus.core.errors import InvalidRequestError

FIRST = "0" * 64
"""What the first entry holds in place of a SHA-256."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Head:
    """The newest entry of a chain: its number, from 1 on, and the SHA-256 of its line in hex."""

    sequence: int = 0
    sha256: str = FIRST

    def __str__(self) -> str:
        return f"{self.sequence}:{self.sha256}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Reads what `str` wrote. Raises InvalidRequestError."""
        number, _, sha256 = text.strip().partition(":")
        if not (number.isascii() and number.isdigit() and len(number) < 20 and _SHA256.fullmatch(sha256)):
            raise InvalidRequestError("head", "is no NUMBER:SHA256, as `chorus audit verify` prints it")
        return cls(int(number), sha256)


@dataclass(frozen=True, slots=True)
class Entry:
    """A deed in its place: `previous` is the SHA-256 of the line before."""

    sequence: int
    previous: str
    deed: Deed


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and with which line of which file; line 0 is the file, or the chain, as a whole."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.what}"


@dataclass(slots=True)
class Report:
    """What reading a chain came to. `head` is that of the last line that could be read."""

    count: int = 0
    first: Entry | None = None
    head: Head = Head()
    problems: list[Problem] = field(default_factory=list)


def append(head: Head, deed: Deed) -> tuple[Head, bytes]:
    """Returns the line that holds `deed`, with its end of line, and the head that it makes."""
    data = {
        "n": head.sequence + 1,
        "at": deed.at,
        "by": deed.by,
        "did": str(deed.kind),
        "to": deed.target,
        **({"facts": dict(deed.facts)} if deed.facts else {}),
        "previous": head.sha256,
    }
    line = json.dumps(data, separators=(",", ":")).encode()
    return Head(head.sequence + 1, digest(line)), line + b"\n"


def digest(line: bytes) -> str:
    """The SHA-256 of a line without its end, in hex."""
    return hashlib.sha256(line).hexdigest()


def read(line: bytes) -> Entry:
    """Reads a line without its end. Raises ValueError saying what is wrong with it."""
    try:
        data = json.loads(line)
        entry = Entry(data["n"], data["previous"], _deed(data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"is no entry ({type(error).__name__})") from None
    if type(entry.sequence) is not int or entry.sequence < 1 or type(entry.previous) is not str:
        raise ValueError("is no entry: its number or its link is none")
    return entry


def verify(files: Iterable[tuple[str, Iterable[bytes]]], *, head: Head | None, known: Head | None = None) -> Report:
    """Checks a chain. `files`: their names and lines with ends, in order; `head`: what is kept beside them, if it is.

    A chain that begins later than with entry 1 (older files lie in an archive) is whole if `known` is the entry before.
    """
    check = _Check(known)
    for name, lines in files:
        for number, line in enumerate(lines, start=1):
            check.take(name, number, line)
    check.end(head)
    return check.report


class _Check:
    """A chain on its way through, line by line."""

    def __init__(self, known: Head | None) -> None:
        self.report = Report()
        self._known = known
        self._met_known = known is None

    def take(self, file: str, number: int, line: bytes) -> None:
        """The next line."""
        report = self.report
        if not line.endswith(b"\n"):
            what = f"is torn after {len(line)} bytes: its service died while it wrote, and says so at its next start"
            report.problems.append(Problem(file, number, what))
            return
        body = line[:-1]
        report.count += 1
        expected = report.head
        try:
            entry = read(body)
        except ValueError as error:
            report.problems.append(Problem(file, number, str(error)))
            report.head = Head(expected.sequence + 1, digest(body))
            return
        if report.first is None:
            report.first = entry
            expected = self._beginning(entry)
        if what := _break(expected, entry):
            report.problems.append(Problem(file, number, what))
        report.head = Head(entry.sequence, digest(body))
        if self._known is not None and entry.sequence == self._known.sequence:
            self._met_known = True
            if report.head != self._known:
                report.problems.append(Problem(file, number, "is not the entry that was noted: the log was rewritten"))

    def end(self, head: Head | None) -> None:
        """There are no more lines."""
        report = self.report
        if head is None:
            if report.count:
                report.problems.append(
                    Problem("head", 0, "is missing or damaged; it tells which entry is the last one")
                )
        elif report.head.sequence < head.sequence:
            what = f"the last entry is {report.head.sequence}, and should be {head.sequence}: the end is missing"
            report.problems.append(Problem("head", 0, what))
        elif report.head.sequence == head.sequence and report.head != head:
            report.problems.append(Problem("head", 0, f"entry {head.sequence}, the last one, was changed"))
        if not self._met_known and self._known is not None:
            what = f"entry {self._known.sequence}, which was noted, is not there"
            report.problems.append(Problem("known", 0, what))

    def _beginning(self, entry: Entry) -> Head:
        """What the first entry should follow."""
        if self._known is not None and entry.sequence == self._known.sequence + 1:
            self._met_known = True
            return self._known
        if self._known is not None and entry.sequence == self._known.sequence:
            return Head(entry.sequence - 1, entry.previous)  # its own digest is compared
        return self.report.head


def _break(expected: Head, entry: Entry) -> str:
    """Why an entry can't follow; empty where it can."""
    if entry.sequence > expected.sequence + 1:
        missing = f"{expected.sequence + 1} to {entry.sequence - 1}"
        return f"is entry {entry.sequence}, and entries {missing} are missing before it"
    if entry.sequence <= expected.sequence:
        return f"is entry {entry.sequence} where {expected.sequence + 1} should be: entries were moved or put in"
    if entry.previous != expected.sha256:
        return "does not follow the entry before it, which was changed, or this one was"
    return ""


def _deed(data: Mapping[str, object]) -> Deed:
    at, by, target, facts = data["at"], data["by"], data["to"], data.get("facts", {})
    if isinstance(at, bool) or not isinstance(at, int | float) or not isinstance(by, str):
        raise TypeError
    if not isinstance(target, str) or not isinstance(facts, dict):
        raise TypeError
    return Deed(float(at), by, str(data["did"]), target, facts)
