"""Lists and tables spelled as one line of text, as flags and environment variables are."""

from __future__ import annotations

import json


def list_of_text(value: object) -> object:
    """Lets one line of text, as flags and environment variables are, stand for a list: `a,b` or JSON."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _json(value)
    return [item.strip() for item in value.split(",") if item.strip()]


def map_of_text(value: object) -> object:
    """Lets one line of text stand for a table: `key=value,other=value` or JSON."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return _json(value)
    pairs: dict[str, str] = {}
    for item in filter(None, (item.strip() for item in value.split(","))):
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError("should be key=value pairs with commas between them")
        if key.strip() in pairs:
            raise ValueError(f"names {key.strip()} twice")
        pairs[key.strip()] = text.strip()
    return pairs


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"should be valid JSON, as it starts like it: {error}") from None
