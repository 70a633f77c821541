"""`chorus rerank`: documents in the order in which they answer a query."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from chorus.cli.connecting import AsJson, Directory, Model, Timeout, connected
from chorus.cli.options import ConfigFile
from chorus.cli.output import console, print_json
from chorus.client import MeshClient, RerankAnswer


def rerank(
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="What the documents are to answer.", show_default=False)
    ],
    documents: Annotated[
        list[str] | None,
        typer.Argument(metavar="DOCUMENT...", help="None: each line of standard input is one.", show_default=False),
    ] = None,
    model: Model = "",
    top: Annotated[int | None, typer.Option("--top", "-n", min=1, help="Show only so many of the best.")] = None,
    as_json: AsJson = False,
    timeout: Timeout = None,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Order documents by how well they answer a query, the best one first. It takes a model made for it: a reranker.

    grep -rh TODO src | chorus rerank --top 5 "memory leaks"
    """
    texts = _documents(documents or [])

    async def run(mesh: MeshClient) -> RerankAnswer:
        return await mesh.rerank(query, texts, model=model, top_n=top)

    answer = asyncio.run(connected(run, directory=directory, file=config, timeout_s=timeout))
    if as_json:
        print_json(to_json(answer, texts))
    else:
        console().print(_table(answer, texts))


def to_json(answer: RerankAnswer, texts: list[str]) -> dict[str, object]:
    """The answer as one object, with the texts in it."""
    return {
        "documents": [
            {"index": found.index, "score": found.score, "truncated": found.truncated, "text": texts[found.index]}
            for found in answer.documents
        ],
        "token_count": answer.token_count,
        "model": answer.model,
        "runner_id": answer.runner_id,
        "node_id": answer.node_id,
    }


def _documents(given: list[str]) -> list[str]:
    """The documents themselves, or each line of a pipe that is not blank."""
    if not given and not sys.stdin.isatty():
        piped = sys.stdin.buffer.read().decode("utf-8", "replace")
        given = [line for line in piped.splitlines() if line.strip()]
    if not given:
        raise typer.BadParameter('there are no documents; for example: chorus rerank "red fox" "a fox" "a brick"')
    return given


def _table(answer: RerankAnswer, texts: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("", justify="right", style="dim", no_wrap=True)
    table.add_column("document")
    for found in answer.documents:
        table.add_row(f"{found.score:.3f}", str(found.index + 1), Text(texts[found.index]))
    return table
