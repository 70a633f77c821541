"""Commands that are imported when they are used: `chorus --help` reads a table, not the whole mesh."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from chorus.cli.output import guarded


@dataclass(frozen=True, slots=True)
class Entry:
    """A command of the top level. `target` is MODULE:NAME of a function or of a Typer app; `panel` groups the help."""

    name: str
    target: str
    help: str
    panel: str
    hidden: bool = False


def group(help: str, epilog: str | None = None) -> typer.Typer:
    """Commands under one word, such as `chorus models`; `help` and `epilog` may hold rich's markup."""
    return typer.Typer(
        help=help,
        epilog=epilog,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )


class LazyCommand(TyperCommand):
    """Stands in the help for a command whose module is imported once its arguments are to be read."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(
            entry.name,
            help=entry.help,
            short_help=entry.help,
            hidden=entry.hidden,
            rich_help_panel=entry.panel,
            add_help_option=False,
        )
        self._entry = entry

    @functools.cached_property
    def loaded(self) -> Any:
        """The command itself."""
        module_name, _, attribute = self._entry.target.partition(":")
        target = getattr(importlib.import_module(module_name), attribute)
        if not isinstance(target, typer.Typer):
            single = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
            single.command(self._entry.name)(target)
            target = single
        command = get_command(target)
        command.name = self._entry.name
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Where a group hands over to its subcommand; from here on the real one answers."""
        return self.loaded.make_context(*args, **kwargs)


class LazyGroup(TyperGroup):
    """The top level: errors of every command end here."""

    entries: tuple[Entry, ...] = ()

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for entry in self.entries:
            self.add_command(LazyCommand(entry), entry.name)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was named."""
        return guarded(functools.partial(super().invoke, ctx))
