"""Loads the configuration: merges its sources, checks it once, and says everything that is wrong with it at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from chorus.config.document import Key, Kind, keys
from chorus.config.sections import ChorusConfig
from chorus.config.sources import Setting, find_file, read_environment, read_file, read_flags
from chorus.core.errors import ConfigError

_SHOWN_VALUE_LENGTH = 80


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration and where it came from: `origins` says so for every key that was set, by its dotted name."""

    config: ChorusConfig
    origins: Mapping[str, str]
    file: Path | None


def load_config(
    *,
    flags: Mapping[str, object] | None = None,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> ChorusConfig:
    """Returns the configuration: `flags` over environment variables over the TOML file over the defaults.

    `flags` holds values by dotted key, such as `{"registry.lease_ttl_s": 3.0}`; None means not given. `file` must exist
    if it is given; otherwise the usual places are looked at. `environ` is the process's own unless it is given.

    Raises ConfigError with one line for every problem: the key, what is wrong, and where it was set.
    """
    return load_with_origins(flags=flags, file=file, environ=environ).config


def load_with_origins(
    *,
    flags: Mapping[str, object] | None = None,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Like `load_config`, but tells where each value came from as well."""
    environ = os.environ if environ is None else environ
    path = find_file(file, environ)
    layers = [read_environment(environ), read_flags(flags or {})]
    if path is not None:
        layers.insert(0, read_file(path))

    settings: dict[str, Setting] = {}
    for layer in layers:
        settings |= layer.settings
    problems = [problem for layer in layers for problem in layer.problems]

    tables: dict[str, dict[str, object]] = {}
    for dotted, setting in settings.items():
        section, _, name = dotted.partition(".")
        tables.setdefault(section, {})[name] = setting.value
    config: ChorusConfig | None = None
    try:
        config = ChorusConfig.model_validate(tables)
    except ValidationError as error:
        known = {key.dotted: key for key in keys()}
        for details in error.errors(include_url=False, include_context=False):
            key = known[".".join(map(str, details["loc"][:2]))]
            problems.append(_line(key, details, settings.get(key.dotted)))
    if config is None or problems:
        raise ConfigError("\n".join(problems))
    return LoadedConfig(config, {dotted: setting.origin for dotted, setting in settings.items()}, path)


def _line(key: Key, details: ErrorDetails, setting: Setting | None) -> str:
    name = key.dotted + "".join(f"[{part!r}]" for part in details["loc"][2:])
    problem = details["msg"].removeprefix("Value error, ")
    if problem.startswith("Input should"):
        problem = problem.removeprefix("Input ")
    # A URL may hold a password, where it should not.
    value = "" if key.secret or key.kind is Kind.SERVER else f"{_shown(details['input'])}: "
    return f"{name} = {value}{problem} ({'default' if setting is None else setting.origin})"


def _shown(value: object) -> str:
    """The value on one line, cut where it is long: a file pasted by mistake should not fill the screen."""
    text = repr(value if isinstance(value, int | float | str | list | dict) else str(value))
    return text if len(text) <= _SHOWN_VALUE_LENGTH else text[:_SHOWN_VALUE_LENGTH] + "…"
