"""The configuration written back: as a TOML file or as environment variables, for a process started by another."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import SecretStr

from chorus.config.document import Key, Kind, keys, toml_value
from chorus.config.sections import ChorusConfig


def to_toml(config: ChorusConfig, *sections: str) -> str:
    """Returns a file that `load_config` reads back as `config` (its `sections` alone, where some are named).

    Keys without a value are left out. Secrets are written: the file is as private as they are.
    """
    lines: list[str] = []
    table = ""
    for key, value in _values(config, sections):
        if key.section != table:
            table = key.section
            lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
        lines.append(f"{key.name} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def to_env(config: ChorusConfig, *sections: str) -> dict[str, str]:
    """Returns environment variables that `load_config` reads back as `config`, like `to_toml`."""
    return {key.env: _env_text(key, value) for key, value in _values(config, sections)}


def _values(config: ChorusConfig, sections: tuple[str, ...]) -> Iterator[tuple[Key, object]]:
    for key in keys(*sections):
        value = getattr(getattr(config, key.section), key.name)
        if value is not None:
            yield key, value.get_secret_value() if isinstance(value, SecretStr) else value


def _env_text(key: Key, value: object) -> str:
    if isinstance(value, tuple):
        return json.dumps([str(item) for item in value], ensure_ascii=False)
    if key.kind is Kind.TABLE:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
