"""From what a server answers in place of a result to the error that Chorus's callers see."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from chorus.core.costs.bills import UPSTREAM_LOST
from chorus.core.errors import (
    ChorusError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    UnavailableError,
    UnknownModelError,
)

_SHOWN = 300
_RETRY_AFTER_S = 1.0
_LONGEST_RETRY_S = 3600.0
_TOO_LONG = re.compile(
    r"context (?:length|size|window)|exceeds? the (?:available |maximum )?context|prompt is too long"
    r"|is too (?:large|long) to process",
    re.IGNORECASE,
)
_NO_SUCH_PATH = ("not found", "file not found", "404 page not found")
_CONTEXT = re.compile(r"context (?:length|size|window)[^0-9]{0,24}(\d+)", re.IGNORECASE)
_PROMPT = (
    re.compile(r"passed (\d+) input tokens"),
    re.compile(r"\((\d+) in the (?:messages|prompt)"),
    re.compile(r"(?:messages resulted in|request \(|prompt (?:contains|has)(?: at least)?) ?(\d+)"),
)

REFUSED = (
    "it refuses this runner's API key; put the right one into the file that runner.remote_api_key_file names, "
    "and start the runner again"
)
"""What is wrong where a server answers 401 or 403."""


class RefusedKeyError(EngineError):
    """The server wants another API key. Another runner may still serve the request."""


class ServerFailedError(EngineError):
    """The server failed at something that it may well be able to do."""


class NoAnswerError(UnavailableError):
    """The server takes connections and does not answer in time: it may be busy, or gone without a word."""


def message_of(body: bytes | Mapping[str, Any]) -> str:
    """What an error's body says, in one line of limited length; empty where it is no error as any server sends it."""
    error = _error_of(body)
    if isinstance(error, Mapping):
        error = error.get("message") or error.get("detail")
    text = error if isinstance(error, str) else ""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def failure(
    status: int,
    body: bytes | Mapping[str, Any],
    *,
    server: str,
    model: str = "",
    context_length: int = 0,
    retry_after: str | None = None,
    known: str = "",
) -> ChorusError:
    """The error for an answer with that HTTP status (0: it came in the middle of a stream, without one).

    `model` and `context_length` are those of the request, where it was about one; `known` names the models there are.
    """
    said = message_of(body)
    because = f": {said}" if said else f" (HTTP {status})" if status else ""
    error = _error_of(body)
    code = error.get("code") if isinstance(error, Mapping) else None
    if not status and isinstance(code, int) and 400 <= code < 600:
        status = code
    if status in (401, 403):
        return RefusedKeyError(f"{server}: {REFUSED}")
    if status in (429, 503):
        return OverloadedError(f"{server} has no place for more now{because}", retry_after_s=_seconds(retry_after))
    if model and _TOO_LONG.search(said) and (status in (400, 413, 422) or not status or status == 500):
        return _too_long(said, error, model, context_length)
    if status == 404 and model and said and said.lower() not in _NO_SUCH_PATH:
        return UnknownModelError(f"{server} has no {model} any more{because}; it has: {known or 'none'}")
    if status in (400, 413, 422):
        return InvalidRequestError("request", f"{server} refuses it{because}")
    if status == 408 or status >= 500:
        # 501 is what a server says that was not made for it.
        return (EngineError if status == 501 else ServerFailedError)(f"{server} failed{because}")
    if not status:
        return EngineError(f"{server} failed in the middle of an answer{because}")
    return EngineError(
        f"{server} answered with HTTP {status}{f': {said}' if said else ''}; is it the right kind of server?"
    )


def broken(server: str, problem: str, *, slow: bool = False, sent: bool = True) -> UnavailableError:
    """The error for a connection that could not be made, or that ended early; `slow`: no answer came in time.

    `sent`: the server may have the request, which a paid provider may charge for.
    """
    return (NoAnswerError if slow else UnavailableError)(
        f"{server}: {problem}", metadata={UPSTREAM_LOST: "true"} if sent else {}
    )


def _too_long(said: str, error: object, model: str, context_length: int) -> ChorusError:
    context = _number(error, "n_ctx") or next(iter(map(int, _CONTEXT.findall(said))), 0) or context_length
    prompt = _number(error, "n_prompt_tokens")
    for pattern in _PROMPT:
        match = pattern.search(said)
        if not prompt and match is not None:
            prompt = int(match.group(1))
    if 0 < prompt < context and ("output" in said or "completion" in said):
        return InvalidRequestError("stop.max_tokens", f"does not fit beside a prompt of {prompt} tokens: {said}")
    if context <= 0 or 0 < prompt < context:
        return InvalidRequestError("prompt", f"is too long for {model}: {said}")
    return PromptTooLongError(prompt or context + 1, context, model=model, at_least=not prompt)


def _error_of(body: bytes | Mapping[str, Any]) -> object:
    if isinstance(body, bytes):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError):
            return None
    if not isinstance(body, Mapping):
        return None
    # vLLM of old, and FastAPI by itself, put the message at the top.
    return body.get("error") or (body if "message" in body or "detail" in body else None)


def _number(error: object, key: str) -> int:
    value = error.get(key) if isinstance(error, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _seconds(retry_after: str | None) -> float:
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return _RETRY_AFTER_S  # a date, or nothing
    return min(max(seconds, 0.05), _LONGEST_RETRY_S) if math.isfinite(seconds) else _RETRY_AFTER_S
