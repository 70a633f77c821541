"""Command-line options made from the configuration's own description: no key is described twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from chorus.config import ChorusConfig, KeyDoc, OptionSpec, describe, load_config, option_specs
from chorus.config.document import Kind

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="TOML file to read. [env: CHORUS_CONFIG]", show_default=False),
]

_TYPES: Mapping[Kind, type] = {Kind.INTEGER: int, Kind.NUMBER: float, Kind.TRUTH: bool, Kind.PATH: Path}


def configured(
    name: str, sections: tuple[str, ...], documentation: str, run: Callable[[ChorusConfig], Any]
) -> typer.Typer:
    """Returns a command with one option for each key of `sections`; it loads the configuration and runs `run`."""
    specs = {spec.parameter: spec for spec in option_specs(*sections)}
    documented = {document.key: document for document in describe(*sections, include_hidden=True)}

    def command(**given: Any) -> None:
        file: Path | None = given.pop("config")
        flags = {specs[parameter].key: value for parameter, value in given.items()}
        run(load_config(flags=flags, file=file))

    parameters = [_parameter("config", ConfigFile)]
    parameters += [_parameter(parameter, _annotation(spec, documented[spec.key])) for parameter, spec in specs.items()]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    example = next(iter(specs.values()))
    key = documented[example.key]
    every_key = f"Every option is a key of the TOML file and an environment variable too: {key.flag} is {key.key}"
    # Two dozen options with a sentence each are no table: rich's would give every sentence a third of the width.
    app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    app.command(name, help=f"{documentation}\n\n{every_key} and {key.env}.")(command)
    return app


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _annotation(spec: OptionSpec, documented: KeyDoc) -> Any:
    default = documented.default.removeprefix("(").removesuffix(")")
    option = typer.Option(
        f"{spec.flag}/{spec.negative_flag}" if spec.negative_flag else spec.flag,
        metavar="" if spec.kind is Kind.TRUTH else "|".join(spec.choices) or spec.metavar,
        help=f"{documented.help} [default: {default}]" if default else documented.help,
        hidden=spec.hidden,
        show_default=False,
    )
    kind: Any = list[str] if spec.multiple else _TYPES.get(spec.kind, str)
    return Annotated[kind | None, option]
