"""Where configured values come from: flags, environment variables and a TOML file, each value with its origin."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from chorus.config.document import CONFIG_FILE_ENV, ENV_PREFIX, Key, Kind, keys
from chorus.config.section import absolute
from chorus.config.sections import SECTIONS
from chorus.core.errors import ConfigError

FILE_NAME = "chorus.toml"
# No configuration needs more; a file this long is somebody's data given by mistake.
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Setting:
    """One value as it was found. `origin` says where, in words for people."""

    value: object
    origin: str


@dataclass(frozen=True, slots=True)
class Layer:
    """What one source says: its settings by dotted key, and a line for each thing in it that is no key."""

    settings: Mapping[str, Setting]
    problems: tuple[str, ...] = ()


def find_file(file: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Returns the file to read: the given one, $CHORUS_CONFIG, ./chorus.toml, or the user's; None where there is none.

    Raises ConfigError where a file was asked for and is not there.
    """
    if file is not None:
        return _existing(file, "--config")
    named = environ.get(CONFIG_FILE_ENV)
    if named:
        return _existing(Path(named), f"environment variable {CONFIG_FILE_ENV}")
    usual = (Path(FILE_NAME), platformdirs.user_config_path("chorus") / FILE_NAME)
    return next((path for path in usual if path.is_file()), None)


def _existing(path: Path, origin: str) -> Path:
    try:
        path = absolute(path)
    except ValueError as error:
        raise ConfigError(f"{path}: {error} ({origin})") from None
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such configuration file ({origin})")
    return path


def read_flags(flags: Mapping[str, object]) -> Layer:
    """Reads command-line flags by dotted key. None means that the flag was not given."""
    settings: dict[str, Setting] = {}
    known = {key.dotted: key for key in keys()}
    for dotted, value in flags.items():
        if value is None:
            continue
        key = known[dotted]  # an unknown one is a defect of the command line, not of what its user wrote
        if key.kind in (Kind.LIST, Kind.TABLE) and isinstance(value, Sequence) and not isinstance(value, str):
            if not value:
                continue  # libraries for options give an empty list where a repeatable flag was not given
            # A repeatable flag may also hold several values at once: --registries a,b --registries c.
            value = ",".join(map(str, value)) if all(isinstance(item, str) for item in value) else value
        settings[dotted] = Setting(value, f"flag {key.flag}")
    return Layer(settings)


def read_environment(environ: Mapping[str, str]) -> Layer:
    """Reads variables such as CHORUS_REGISTRY__LISTEN. An empty one counts as not set.

    Those without a double underscore are left alone: Kubernetes sets CHORUS_REGISTRY_PORT and its like by itself.
    """
    settings: dict[str, Setting] = {}
    problems: list[str] = []
    known = {key.env: key for key in keys()}
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or "__" not in name:
            continue
        key = known.get(name)
        if key is None:
            hint = _hint(name.upper(), [other.env for other in _visible()])
            problems.append(f"{name}: there is no such key{hint} (environment variable {name})")
        elif value:
            settings[key.dotted] = Setting(value, f"environment variable {name}")
    return Layer(settings, tuple(problems))


def read_file(path: Path) -> Layer:
    """Reads a TOML file, relative paths in it from its own folder. Raises ConfigError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise ConfigError(f"{path}: is larger than {_MAX_FILE_BYTES} bytes, so it is no configuration file")
        text = content.decode("utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        problem = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "tables are nested too deep"
        raise ConfigError(f"{path}: is not valid TOML: {problem}") from error
    lines = _lines_of(text)
    settings: dict[str, Setting] = {}
    problems: list[str] = []

    def origin(*key_path: str) -> str:
        line = lines.get(key_path)
        return f"{path}:{line}" if line else str(path)

    for section, table in document.items():
        if section not in SECTIONS:
            problems.append(f"{section}: there is no such section{_hint(section, list(SECTIONS))} ({origin(section)})")
            continue
        if not isinstance(table, dict):
            problems.append(f"{section}: should be a table, [{section}] ({origin(section)})")
            continue
        known = {key.name: key for key in keys(section)}
        for name, value in table.items():
            key = known.get(name)
            where = origin(section, name)
            if key is None:
                problems.append(f"{section}.{name}: there is no such key{_hint_for(section, name)} ({where})")
            else:
                settings[key.dotted] = Setting(_beside(path, key, value), where)
    return Layer(settings, tuple(problems))


def _beside(file: Path, key: Key, value: object) -> object:
    if key.kind is not Kind.PATH or not isinstance(value, str) or not value or value.startswith("~"):
        return value
    return file.absolute().parent / value


def _visible(*sections: str) -> Iterator[Key]:
    return (key for key in keys(*sections) if not key.hidden)


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def _hint_for(section: str, name: str) -> str:
    """The nearest key of this section, or else the section that does have a key of this name."""
    hint = _hint(name, [key.name for key in _visible(section)])
    elsewhere = [key.dotted for key in _visible() if key.name == name]
    return hint if hint or not elsewhere else f", did you mean {' or '.join(elsewhere)}?"


_HEADER = re.compile(r"\s*\[\s*([A-Za-z0-9_-]+)(?:\s*\.\s*([A-Za-z0-9_-]+))?[^\]]*\]\s*(?:#.*)?")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z0-9_-]+)(?:\s*\.\s*([A-Za-z0-9_-]+))?[^=]*=")


def _lines_of(text: str) -> dict[tuple[str, ...], int]:
    """The line on which each section and key stands, as far as a glance can tell: tomllib does not say.

    Read from valid TOML alone. Exotic spellings (quoted keys, look-alikes within multi-line strings) may be missed or
    mistaken, which costs an error message its line number and nothing else.
    """
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.fullmatch(line):
            table = tuple(filter(None, header.groups()))
            path = table
        elif assignment := _ASSIGNMENT.match(line):
            path = (*table, *filter(None, assignment.groups()))
        else:
            continue
        for depth in (1, 2):
            found.setdefault(path[:depth], number)
    return found
