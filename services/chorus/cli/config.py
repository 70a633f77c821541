"""`chorus config`: what is configured, where from, and what could be."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from chorus.cli.options import ConfigFile
from chorus.cli.output import console, handles_errors, print_json
from chorus.config import LoadedConfig, describe, load_with_origins, to_toml
from chorus.config.sections import SECTIONS

app = typer.Typer(
    help="Show the configuration in use, and describe its keys.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _known(names: list[str] | None) -> list[str]:
    for name in names or ():
        if name not in SECTIONS:
            raise typer.BadParameter(f"there is no section {name!r}, only {', '.join(SECTIONS)}")
    return names or []


Sections = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION", callback=_known, help=f"{', '.join(SECTIONS)}. Default: all.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
@handles_errors
def show(sections: Sections = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show every value in use, and where each one was set.

    The output is a TOML file that gives the same configuration; values without a comment are defaults.
    """
    loaded = load_with_origins(file=config)
    names = sections or list(SECTIONS)
    hidden = {document.key for document in describe(*names, include_hidden=True)} - {
        document.key for document in describe(*names)
    }
    if as_json:
        values = loaded.config.model_dump(mode="json", include=set(names))
        for key in hidden - set(loaded.origins):
            section, _, name = key.partition(".")
            del values[section][name]
        origins = {key: origin for key, origin in loaded.origins.items() if key.partition(".")[0] in names}
        print_json({"file": str(loaded.file) if loaded.file else None, "values": values, "origins": origins})
        return
    for line in _annotated(loaded, names, hidden):
        sys.stdout.write(line + "\n")


def _annotated(loaded: LoadedConfig, names: list[str], hidden: set[str]) -> list[str]:
    lines = [f"# read from {loaded.file}" if loaded.file else "# no configuration file was found"]
    section = ""
    for line in to_toml(loaded.config, *names).splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        key = f"{section}.{line.partition(' = ')[0]}"
        origin = loaded.origins.get(key)
        if key not in hidden or origin:
            lines.append(f"{line}  # {origin}" if origin else line)
    return lines


@app.command()
@handles_errors
def docs(
    sections: Sections = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Describe every key: its type, default, environment variable and flag.

    Flags win over environment variables, these over the TOML file, and that over the defaults.

    The file is that of --config or CHORUS_CONFIG, else ./chorus.toml, else chorus.toml in the configuration folder.
    """
    documented = describe(*sections or ())
    if as_json:
        print_json([asdict(document) for document in documented])
        return
    if markdown:
        sys.stdout.write("| Key | Type | Default | Meaning |\n| --- | --- | --- | --- |\n")
        for document in documented:
            default = f"`{document.default}`" if document.default and document.default[0] != "(" else document.default
            kind = document.type.replace("|", "\\|")
            sys.stdout.write(f"| `{document.key}` | {kind} | {default} | {document.help} |\n")
        return
    from rich.text import Text

    for document in documented:
        heading = Text.assemble((document.key, "bold"), f"  {document.type}", (f"  {document.default}", "cyan"))
        console().print(heading)
        console().print(Text(f"    {document.help}"))
        console().print(Text(f"    {document.flag}  {document.env}", style="dim"))
