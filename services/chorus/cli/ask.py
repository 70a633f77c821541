"""`chorus ask`: one question, one answer."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer

from chorus.cli.answering import Answer, stream_events, stream_text
from chorus.cli.connecting import Adapter, Directory, Model, System, Timeout, connected
from chorus.cli.options import ConfigFile
from chorus.cli.output import err, print_json
from chorus.client import Fallback, MeshClient


def ask(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="The question. A - stands for standard input.", show_default=False),
    ] = None,
    model: Model = "",
    adapter: Adapter = "",
    system: System = "",
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", min=1, help="Longest answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", min=0.0, max=5.0, help="0 always takes the likeliest token.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="The same seed draws the same tokens.")] = None,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Where no runner can serve the model, let the most similar one answer.")
    ] = False,
    stats: Annotated[
        bool | None, typer.Option("--stats/--no-stats", help="Show who answered and how fast. Default: on a terminal.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    json_events: Annotated[bool, typer.Option("--json-events", help="Print each event as a line of JSON.")] = False,
    timeout: Timeout = None,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Ask one question; the answer is streamed as it is written. Ctrl-C ends it, for the runner too.

    git diff | chorus ask "Write a commit message for this:" -

    chorus ask --json --max-tokens 20 "Name a river." | jq -r .text
    """
    question = _question(prompt or [])

    async def run(mesh: MeshClient) -> Answer:
        generation = mesh.generate(
            question,
            model=model,
            adapter=adapter,
            instructions=system,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            fallback=Fallback(similar_model=fallback),
        )
        if json_events:
            return await stream_events(generation)
        if as_json:
            answer = Answer()
            async with generation:
                async for event in generation:
                    answer.take(event)
            return answer
        return await stream_text(generation)

    answer = asyncio.run(connected(run, directory=directory, file=config, timeout_s=timeout))
    if as_json:
        print_json(answer.to_json())
    elif stats or (stats is None and not json_events and sys.stdout.isatty() and err().is_terminal):
        err().print(f"[dim]{answer.stats()}[/]", soft_wrap=True)


def _question(words: list[str]) -> str:
    """The prompt's words; a lone dash, or a pipe where there are no words at all, stands for standard input."""
    if not words and sys.stdin.isatty():
        raise typer.BadParameter('there is no question; for example: chorus ask "Why is the sky blue?"')
    if words.count("-") > 1:
        raise typer.BadParameter("standard input can be read once only, so give one - at most")
    if not words or "-" in words:
        place = words.index("-") if words else 0
        piped = sys.stdin.buffer.read().decode("utf-8", "replace").strip("\n")
        question = "\n\n".join(filter(None, [" ".join(words[:place]), piped, " ".join(words[place + 1 :])]))
    else:
        question = " ".join(words)
    if not question.strip():
        raise typer.BadParameter("the question is empty")
    return question
