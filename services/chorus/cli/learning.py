"""`chorus learning`: what coordinators learn of models and strategies, freezing it, forgetting it, rating an answer."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from chorus.cli.connecting import AsJson, Directory, connected
from chorus.cli.lazy import group
from chorus.cli.options import ConfigFile
from chorus.cli.output import EXIT_DEGRADED, console, handles_errors, note, print_json
from chorus.client import MeshClient, MeshLearning

if TYPE_CHECKING:
    from rich.table import Table

app = group(
    help="Show, freeze and reset what coordinators learn of models and strategies.\n\nEach learns for itself, from how "
    "answers of ensembles fare and are rated, until it is restarted, where ensemble.learning is watch or on. It is off "
    "by default: over recorded answers, auto was better by its rules.",
)


@app.command()
@handles_errors
def show(as_json: AsJson = False, directory: Directory = None, config: ConfigFile = None) -> None:
    """Show what each way of answering has earned, by kind of question.

    Exit codes: 0 all coordinators answered, 1 none did, 3 some are missing (they are listed).
    """
    seen = asyncio.run(connected(MeshClient.learning, directory=directory, file=config, timeout_s=10.0))
    if as_json:
        learnt = {name: asdict(own) for name, own in seen.learnt.items()}
        print_json({"coordinators": learnt, "missing": seen.missing})
    else:
        console().print(_table(seen))
        for name, own in seen.learnt.items():
            note(f"{name}: learning is {own.mode}{', frozen' if own.frozen else ''}")
        for name, why in seen.missing.items():
            note(f"{name}: {why}")
    if seen.missing:
        raise typer.Exit(EXIT_DEGRADED)


@app.command()
@handles_errors
def freeze(
    undo: Annotated[bool, typer.Option("--undo", help="Learn on.")] = False,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Learn nothing more at any coordinator, and go by the best that is known. Takes an admin's certificate."""

    async def run(mesh: MeshClient) -> None:
        await mesh.change_learning(frozen=not undo)

    asyncio.run(connected(run, directory=directory, file=config, timeout_s=10.0))
    sys.stdout.write("learning on\n" if undo else "frozen\n")


@app.command()
@handles_errors
def reset(directory: Directory = None, config: ConfigFile = None) -> None:
    """Forget all that was learnt, at every coordinator. Takes an admin's certificate."""

    async def run(mesh: MeshClient) -> None:
        await mesh.change_learning(reset=True)

    asyncio.run(connected(run, directory=directory, file=config, timeout_s=10.0))
    sys.stdout.write("forgotten\n")


@app.command()
@handles_errors
def rate(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="Of the answer, as its Started says.")],
    rating: Annotated[float, typer.Argument(min=0.0, max=1.0, help="From 0, useless, to 1.")],
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Say how good an answer of an ensemble was. One of your own, among the latest thousand; it counts once."""

    async def run(mesh: MeshClient) -> None:
        await mesh.rate(request_id, rating)

    asyncio.run(connected(run, directory=directory, file=config, timeout_s=10.0))
    sys.stdout.write("noted\n")


def _table(seen: MeshLearning) -> Table:
    from rich.table import Table

    table = Table("coordinator", "context", "strategy", "model", "answers", "mean reward", box=None)
    for name, own in seen.learnt.items():
        for one in own.earned:
            table.add_row(name, one.context, one.strategy, one.model, f"{one.count:.0f}", f"{one.mean:.3f}")
    return table
