"""`chorus explain`: where a request would go, and why not elsewhere."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from chorus.cli.connecting import AsJson, Directory, MaxTokens, Model, connected
from chorus.cli.options import ConfigFile
from chorus.cli.output import EXIT_FAILED, console, print_json, show_error
from chorus.client import MeshClient, PlacementExplanation, chat_request


def explain(
    prompt: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="The question that would be asked.")],
    model: Model = "",
    max_tokens: MaxTokens = None,
    as_json: AsJson = False,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Show which runner would answer a question now, what each would cost, and why the others cannot. Nothing is run.

    Exit codes: 0 somebody would answer, 1 nobody could, or the mesh cannot be reached.
    """
    request = chat_request(" ".join(prompt), model=model, max_tokens=max_tokens)

    async def run(mesh: MeshClient) -> PlacementExplanation:
        return await mesh.explain_placement(request)

    explanation = asyncio.run(connected(run, directory=directory, file=config))
    if as_json:
        print_json(asdict(explanation))
    else:
        console().print(_table(explanation))
    if not explanation.chosen_runner_id:
        if not as_json:
            show_error(explanation.error_message)
        raise typer.Exit(EXIT_FAILED)


def _table(explanation: PlacementExplanation) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("", "runner", "node", "model", "cost", "why"):
        table.add_column(column, justify="right" if column == "cost" else "left", no_wrap=column != "why")
    for candidate in explanation.candidates:
        chosen = candidate.runner_id == explanation.chosen_runner_id
        terms = " + ".join(f"{name} {value:.3f}" for name, value in candidate.terms.items())
        table.add_row(
            Text("chosen" if chosen else "could", style="bold green" if chosen else ""),
            candidate.runner_id,
            candidate.node_id,
            candidate.artifact,
            f"{candidate.cost:.3f} s",
            terms,
        )
    for rejected in explanation.rejected:
        table.add_row(
            Text("cannot", style="yellow"),
            rejected.runner_id,
            rejected.node_id,
            "",
            "",
            f"{rejected.reason.replace('_', ' ')}: {rejected.detail}",
        )
    return table
