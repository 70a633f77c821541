"""The documentation of every key, and the command-line options, derived from the section models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from chorus.config.address import Endpoint, ListenAddress
from chorus.config.remote import RemoteServer
from chorus.config.sections import SECTIONS

ENV_PREFIX = "CHORUS_"
CONFIG_FILE_ENV = "CHORUS_CONFIG"


class Kind(StrEnum):
    """What the value of a key looks like."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    TRUTH = "true or false"
    CHOICE = "choice"
    PATH = "path"
    LISTEN = "HOST:PORT"
    ENDPOINT = "[NAME@]HOST:PORT"
    SERVER = "KIND=URL"
    LIST = "list"
    TABLE = "table"


_KINDS: Mapping[type, Kind] = {
    bool: Kind.TRUTH,
    int: Kind.INTEGER,
    float: Kind.NUMBER,
    str: Kind.TEXT,
    SecretStr: Kind.TEXT,
    Path: Kind.PATH,
    ListenAddress: Kind.LISTEN,
    Endpoint: Kind.ENDPOINT,
    RemoteServer: Kind.SERVER,
    tuple: Kind.LIST,
    Mapping: Kind.TABLE,
}

_METAVARS = {
    Kind.TABLE: "KEY=VALUE",
    Kind.LISTEN: "HOST:PORT",
    Kind.ENDPOINT: "[NAME@]HOST:PORT",
    Kind.SERVER: "KIND=URL",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the configuration, with what the loader and the documentation need to know of its field."""

    section: str
    name: str
    field: FieldInfo

    @property
    def dotted(self) -> str:
        """`section.name`, by which messages and flags name the key."""
        return f"{self.section}.{self.name}"

    @property
    def env(self) -> str:
        """Name of the environment variable that sets it."""
        return f"{ENV_PREFIX}{self.section}__{self.name}".upper()

    @property
    def flag(self) -> str:
        """Command-line flag that sets it, unambiguous within the command that runs its section."""
        return "--" + f"{SECTIONS[self.section].flag_prefix}{self.name}".replace("_", "-")

    @property
    def kind(self) -> Kind:
        """What its value looks like."""
        shown = self._extra("shown_kind", None)
        if shown is not None:
            return Kind(str(shown))
        return Kind.CHOICE if self.choices else _KINDS[_origin(_required(self.field.annotation))]

    @property
    def item_kind(self) -> Kind | None:
        """What the items of a list look like; None where it is no list."""
        if self.kind is not Kind.LIST:
            return None
        item = get_args(_required(self.field.annotation))[0]
        return _KINDS[_origin(get_args(item)[0] if hasattr(item, "__metadata__") else item)]

    @property
    def choices(self) -> tuple[str, ...]:
        """The values allowed, where they are few."""
        annotation = _required(self.field.annotation)
        return get_args(annotation) if get_origin(annotation) is Literal else ()

    @property
    def secret(self) -> bool:
        """Whether its value must never be shown."""
        return SecretStr in (self.field.annotation, *get_args(self.field.annotation))

    @property
    def hidden(self) -> bool:
        """Whether documentation leaves it out."""
        return bool(self._extra("hidden", False))

    @property
    def default(self) -> object:
        """Its default; None for none, and where it depends on the machine."""
        return None if self.default_in_words else self.field.get_default()

    @property
    def default_in_words(self) -> str:
        """What its default depends on, where it does; else empty."""
        return str(self._extra("shown_default", ""))

    def _extra(self, name: str, otherwise: object) -> object:
        extra = self.field.json_schema_extra
        return extra.get(name, otherwise) if isinstance(extra, dict) else otherwise


@dataclass(frozen=True, slots=True)
class KeyDoc:
    """One row of the configuration's documentation. `default` is TOML, or words in parentheses, or empty for none."""

    key: str
    type: str
    default: str
    env: str
    flag: str
    help: str


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """One command-line option, in terms that any library for options can build it from.

    Every option's own default must be "not given" (None): the value then comes from the environment, the file or the
    default, in this order. What was given goes to `load_config(flags={spec.key: value})`.
    """

    key: str  # "registry.lease_ttl_s"
    flag: str  # "--lease-ttl-s"
    negative_flag: str | None  # "--no-allow-load", for true or false alone
    kind: Kind
    choices: tuple[str, ...]
    multiple: bool  # may be given more than once
    metavar: str
    help: str  # the description with default and environment variable
    hidden: bool

    @property
    def parameter(self) -> str:
        """A Python identifier for the option, unique among all sections."""
        return self.key.replace(".", "_")


def keys(*sections: str) -> Iterator[Key]:
    """Every key of `sections` (of all, where none is named), a section's own before those it shares with others."""
    for section in sections or SECTIONS:
        model = SECTIONS[section]
        own = [name for name in model.model_fields if name in model.__annotations__]
        shared = [name for name in model.model_fields if name not in model.__annotations__]
        for name in (*own, *shared):
            yield Key(section, name, model.model_fields[name])


def describe(*sections: str, include_hidden: bool = False) -> list[KeyDoc]:
    """Returns the documentation of every key of `sections`, or of the whole configuration."""
    return [
        KeyDoc(key.dotted, _type_text(key), _default_toml(key), key.env, key.flag, key.field.description or "")
        for key in keys(*sections)
        if include_hidden or not key.hidden
    ]


def option_specs(*sections: str) -> list[OptionSpec]:
    """Returns the command-line options of `sections`, hidden ones marked as such."""
    return [_option(key) for key in keys(*sections)]


def _option(key: Key) -> OptionSpec:
    kind = key.item_kind or key.kind
    default = _default_text(key)
    notes = [f"default: {default}"] if default else []
    return OptionSpec(
        key=key.dotted,
        flag=key.flag,
        negative_flag=f"--no-{key.flag[2:]}" if kind is Kind.TRUTH else None,
        kind=key.kind,
        choices=key.choices,
        multiple=key.kind in (Kind.LIST, Kind.TABLE),
        metavar="|".join(key.choices) or _METAVARS.get(kind, kind.name),
        help=f"{key.field.description} [{'; '.join([*notes, f'env: {key.env}'])}]",
        hidden=key.hidden,
    )


def _default_toml(key: Key) -> str:
    if key.default_in_words:
        return f"({key.default_in_words})"
    return "" if key.default is None else toml_value(key.default)


def _default_text(key: Key) -> str:
    """The default as one would type it after the flag."""
    default = key.default
    if key.default_in_words or not default:
        return key.default_in_words or ("" if default is None or default == {} else toml_value(default))
    return ",".join(map(str, default)) if isinstance(default, tuple) else toml_value(default).strip('"')


def _type_text(key: Key) -> str:
    if key.choices:
        return " | ".join(key.choices)
    return f"list of {key.item_kind}" if key.item_kind is not None else str(key.kind)


def _required(annotation: Any) -> Any:
    """Strips `| None` from an annotation."""
    if get_origin(annotation) in (UnionType, Union):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _origin(annotation: Any) -> Any:
    return get_origin(annotation) or annotation


def toml_value(value: object) -> str:
    """Returns `value` as TOML spells it on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{toml_value(str(key))} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    # JSON's escapes are TOML's, but for one character that JSON leaves as it is.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
