"""Finding the tool calls that a model writes into its text as `<tool_call>{"name": …, "arguments": …}</tool_call>`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from chorus.core.text.strict_json import parse_json

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A call as the model wrote it. `arguments_json` is the text of its arguments, valid JSON."""

    name: str
    arguments_json: str


class ToolCallReader:
    """Takes text in pieces and parts it into plain text and calls; what may yet become a tag is withheld.

    What stands between tags but is no call (broken JSON, no name) is given back as the plain text it is.
    """

    def __init__(self) -> None:
        self._held = ""
        self.count = 0

    def feed(self, text: str) -> tuple[str, list[WrittenCall]]:
        """Takes new text; returns the plain text that is certain now, and the calls that it completed."""
        self._held += text
        plain: list[str] = []
        calls: list[WrittenCall] = []
        while True:
            before, opened, inside = self._held.partition(_OPEN)
            if not opened:
                certain = len(before) - _overlap(before, _OPEN)
                plain.append(before[:certain])
                self._held = before[certain:]
                return "".join(plain), calls
            plain.append(before)
            body, closed, after = inside.partition(_CLOSE)
            if not closed:
                self._held = opened + inside
                return "".join(plain), calls
            call = _read(body)
            if call is None:
                plain.append(opened + body + closed)
            else:
                calls.append(call)
                self.count += 1
            self._held = after

    def flush(self) -> str:
        """The text ended: returns what was withheld."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, tag: str) -> int:
    """The length of the longest end of `text` that begins `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def _read(body: str) -> WrittenCall | None:
    try:
        call = parse_json(body)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            parse_json(arguments)
        except ValueError:
            return None
        return WrittenCall(call["name"], arguments)
    return WrittenCall(call["name"], json.dumps(arguments, ensure_ascii=False))
