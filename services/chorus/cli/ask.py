"""`chorus ask`: one question, one answer."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

import typer

from chorus.cli.answering import Answer, stream_events, stream_text
from chorus.cli.connecting import (
    Adapter,
    ApiKeyFile,
    Ca,
    CoordinatorAddress,
    Directory,
    MaxTokens,
    Model,
    Seed,
    System,
    Temperature,
    Timeout,
    connected,
)
from chorus.cli.ensemble_options import (
    Complexity,
    Deadline,
    Facets,
    Judge,
    Members,
    Quorum,
    Rounds,
    Strategy,
    Threshold,
    ensemble_options,
)
from chorus.cli.ensembles import EnsembleAnswer, read_ensemble, show_verdict, stream_ensemble, stream_ensemble_events
from chorus.cli.options import ConfigFile
from chorus.cli.output import err, print_json
from chorus.client import CacheMode, EnsembleGeneration, Fallback, MeshClient


def ask(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="The question. A - stands for standard input.", show_default=False),
    ] = None,
    model: Model = "",
    adapter: Adapter = "",
    system: System = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    external: Annotated[
        bool,
        typer.Option(
            "--external", help="Let a paid provider answer where nobody else can; whoever names its model need not."
        ),
    ] = False,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Where no runner can serve the model, let the most similar one answer.")
    ] = False,
    cache: Annotated[
        CacheMode | None,
        typer.Option(
            "--cache",
            help="Whether an earlier answer may do: to the very same question (exact), or to one that means the same, "
            "too (semantic).",
            show_default=False,
        ),
    ] = None,
    strategy: Strategy = None,
    member: Members = None,
    complexity: Complexity = None,
    judge: Judge = "",
    quorum: Quorum = 0,
    deadline: Deadline = None,
    threshold: Threshold = None,
    rounds: Rounds = 0,
    facets: Facets = "",
    stats: Annotated[
        bool | None, typer.Option("--stats/--no-stats", help="Show who answered and how fast. Default: on a terminal.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    json_events: Annotated[bool, typer.Option("--json-events", help="Print each event as a line of JSON.")] = False,
    timeout: Timeout = None,
    api_key_file: ApiKeyFile = None,
    ca: Ca = None,
    coordinator: CoordinatorAddress = None,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Ask one question; the answer is streamed as it is written. Ctrl-C ends it, for the runner too.

    git diff | chorus ask "Write a commit message for this:" -

    chorus ask --json --max-tokens 20 "Name a river." | jq -r .text

    chorus ask --coordinator 10.0.0.2:7303 --api-key-file ~/chorus.key --ca SHA256 "Hello"

    chorus ask --strategy vote --member smollm2-135m-instruct*3 --member gemma-3-270m "What is the capital of Chile?"
    """
    question = _question(prompt or [])
    ensemble = ensemble_options(
        strategy, member, complexity, judge, quorum, deadline, threshold, rounds=rounds, facet_set=facets
    )
    key = {"client.api_key_file": api_key_file, "client.ca": ca, "client.coordinators": coordinator}
    common: dict[str, Any] = {
        "model": model,
        "instructions": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "fallback": Fallback(similar_model=fallback, external=external),
    }
    if ensemble is not None:
        if adapter:
            raise typer.BadParameter("an adapter is one model's; leave --adapter out of an ensemble")
        if cache not in (None, CacheMode.OFF):
            raise typer.BadParameter("answers of several models are not kept; leave --cache out of an ensemble")
        whole = asyncio.run(
            connected(
                lambda mesh: _ensemble(mesh.ensemble(question, ensemble, **common), as_json, json_events),
                directory=directory,
                file=config,
                timeout_s=timeout,
                key=key,
            )
        )
        if as_json:
            print_json(whole.to_json())
        elif whole.verdict is not None and stats is not False and not json_events:
            show_verdict(whole.verdict)
        return

    async def run(mesh: MeshClient) -> Answer:
        generation = mesh.generate(question, adapter=adapter, cache=cache, **common)
        if json_events:
            return await stream_events(generation)
        if as_json:
            answer = Answer()
            async with generation:
                async for event in generation:
                    answer.take(event)
            return answer
        return await stream_text(generation)

    answer = asyncio.run(connected(run, directory=directory, file=config, timeout_s=timeout, key=key))
    if as_json:
        print_json(answer.to_json())
    elif stats or (stats is None and not json_events and sys.stdout.isatty() and err().is_terminal):
        err().print(f"[dim]{answer.stats()}[/]", soft_wrap=True)


async def _ensemble(generation: EnsembleGeneration, as_json: bool, json_events: bool) -> EnsembleAnswer:
    if json_events:
        return await stream_ensemble_events(generation)
    return await (read_ensemble(generation) if as_json else stream_ensemble(generation))


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
