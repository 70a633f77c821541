"""A dataset: questions with the answers that count as right, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chorus.core.errors import InvalidRequestError

FORMAT = """\
Each line is an object. "prompt" is raw text for the model to go on with, or "question" what a user asks; "answers" are
the texts that count as right (or "answer", if there is one). Besides: "choices" (of which one is right), "stop" (what
ends an answer), "id", "family" (items are grouped by it) and "split"."""
_KEYS = {"prompt", "question", "answers", "answer", "choices", "stop", "id", "family", "split"}


@dataclass(frozen=True, slots=True)
class Item:
    """One question. `answers`: any of them is right; with `choices`, the right one is among these.

    `prompt` is raw text, or what a user says where it is `chat`. `family` groups items in reports.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    family: str = ""
    split: str = "test"
    choices: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    chat: bool = False


def read_dataset(path: Path) -> list[Item]:
    """Every item of a JSONL file. Raises `InvalidRequestError` that names the line which is wrong."""
    try:
        # Not splitlines, which ends a line at U+2028, too: JSON may have it in a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError("dataset", f"{path} can't be read: {error}") from None
    items = [_item(line, number, path) for number, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise InvalidRequestError("dataset", f"{path} has no items. {FORMAT}")
    seen: dict[str, int] = {}
    for number, item in enumerate(items, start=1):
        if item.id in seen:
            raise InvalidRequestError(
                "dataset", f"items {seen[item.id]} and {number} of {path} both have the id {item.id}"
            )
        seen[item.id] = number
    return items


def write_dataset(path: Path, items: Iterable[Item]) -> None:
    """Writes items as `read_dataset` reads them."""
    with path.open("w", encoding="utf-8") as file:
        for item in items:
            told: dict[str, Any] = {key: value for key, value in asdict(item).items() if value or key == "answers"}
            if told.pop("chat", False):
                told["question"] = told.pop("prompt")
            file.write(json.dumps(told, ensure_ascii=False) + "\n")


def _item(line: str, number: int, path: Path) -> Item:
    where = f"{path}:{number}"
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("dataset", f"{where} is no JSON: {error}. {FORMAT}") from None
    if not isinstance(told, dict):
        raise InvalidRequestError("dataset", f"{where} is no object. {FORMAT}")
    if unknown := sorted(set(told) - _KEYS):
        raise InvalidRequestError("dataset", f"{where} has {', '.join(unknown)}, which nobody knows. {FORMAT}")
    if ("prompt" in told) == ("question" in told):
        raise InvalidRequestError("dataset", f"{where} needs either a prompt or a question. {FORMAT}")
    answers = _texts(told, "answers", where) or ((_text(told, "answer", where),) if "answer" in told else ())
    choices = _texts(told, "choices", where)
    if not answers:
        raise InvalidRequestError("dataset", f"{where} has no answers. {FORMAT}")
    if choices and not set(answers) & set(choices):
        raise InvalidRequestError("dataset", f"{where} has choices none of which is an answer")
    key = "prompt" if "prompt" in told else "question"
    return Item(
        id=_text(told, "id", where) or str(number),
        prompt=_text(told, key, where),
        answers=answers,
        family=_text(told, "family", where),
        split=_text(told, "split", where) or "test",
        choices=choices,
        stop=_texts(told, "stop", where),
        chat=key == "question",
    )


def _text(told: dict[str, Any], key: str, where: str) -> str:
    value = told.get(key, "")
    if isinstance(value, int | float) and not isinstance(value, bool) and key in ("id", "answer"):
        value = str(value)
    if not isinstance(value, str) or (key in ("prompt", "question") and not value.strip()):
        raise InvalidRequestError("dataset", f"{where}: {key} must be text. {FORMAT}")
    return value


def _texts(told: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = told.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise InvalidRequestError("dataset", f"{where}: {key} must be a list of texts. {FORMAT}")
    return tuple(values)
