"""`chorus cache`: what is in the cache of answers, filling it ahead, and clearing it."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chorus.cli.connecting import AsJson, Directory, MaxTokens, Model, Seed, System, Temperature, Timeout, connected
from chorus.cli.lazy import group
from chorus.cli.options import ConfigFile
from chorus.cli.output import EXIT_DEGRADED, EXIT_FAILED, console, handles_errors, note, print_json
from chorus.client import CacheMode, CacheOutcome, MeshCache, MeshClient, chat_request
from chorus.core.errors import ChorusError
from chorus.core.generation import GenerationRequest, Priority
from chorus.local.connect import client_config
from chorus.local.home import MeshHome

if TYPE_CHECKING:
    from rich.table import Table

app = group(
    help="Show, fill and clear the cache of answers.\n\nEach coordinator keeps answers of its own, and gives one again "
    "only to the caller that had it: to the same certificate. `chorus ask --cache exact` asks for it; cache.mode makes "
    "it what requests get that say nothing.",
)

# Enough that a runner's batch has something to work on, little beside what people ask.
_AT_ONCE = 4


@app.command()
@handles_errors
def show(as_json: AsJson = False, directory: Directory = None, config: ConfigFile = None) -> None:
    """Show how many answers are kept, and how often they were given again.

    Exit codes: 0 all coordinators answered, 1 none did, 3 some are missing (they are listed).
    """
    seen = asyncio.run(connected(MeshClient.cache, directory=directory, file=config, timeout_s=10.0))
    if as_json:
        print_json({"coordinators": {name: asdict(held) for name, held in seen.held.items()}, "missing": seen.missing})
    else:
        console().print(_table(seen))
        for name, why in seen.missing.items():
            note(f"{name}: {why}")
        for name, held in seen.held.items():
            if held.semantic_problem:
                note(f"{name}: {held.semantic_problem}")
    if seen.missing:
        raise typer.Exit(EXIT_DEGRADED)


@app.command()
@handles_errors
def clear(
    everybody: Annotated[
        bool, typer.Option("--everybody", help="Everybody's answers, not only yours; takes an admin's certificate.")
    ] = False,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Forget your answers at every coordinator."""

    async def run(mesh: MeshClient) -> int:
        return sum((await mesh.clear_cache(everybody=everybody)).values())

    forgotten = asyncio.run(connected(run, directory=directory, file=config, timeout_s=10.0))
    sys.stdout.write(f"{forgotten} answer{'' if forgotten == 1 else 's'} forgotten\n")


@app.command()
@handles_errors
def warm(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="JSON lines: a question each, or an object. - is standard input."),
    ],
    model: Model = "",
    system: System = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    semantic: Annotated[
        bool, typer.Option("--semantic", help="Keep them for questions that mean the same, too.")
    ] = False,
    timeout: Timeout = None,
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Have questions answered ahead, at every coordinator, so that whoever asks them in the same way need not wait.

    A line is a question in quotes, or an object with `prompt` and, beside what the options say, `system`, `max_tokens`,
    `temperature` or `seed`. An answer is found again with the same model and settings alone.

    echo '{"prompt": "What are your opening hours?", "max_tokens": 80}' | chorus cache warm -
    """
    given = {"model": model, "instructions": system, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    requests = _requests(_lines(file), given)
    mode = CacheMode.SEMANTIC if semantic else CacheMode.EXACT
    settings = client_config(MeshHome.find(directory), file=config, timeout_s=timeout)

    async def run() -> dict[str, int]:
        counts = {"made": 0, "there": 0, "failed": 0}
        for endpoint in settings.client.coordinators:
            alone = settings.client.model_copy(update={"coordinators": (endpoint,)})
            async with MeshClient.from_config(settings.model_copy(update={"client": alone})) as mesh:
                await _warm(mesh, requests, mode, counts)
        return counts

    counts = asyncio.run(run())
    sys.stdout.write(f"{counts['made']} answered, {counts['there']} were there already, {counts['failed']} failed\n")
    if counts["failed"]:
        raise typer.Exit(EXIT_FAILED)


async def _warm(mesh: MeshClient, requests: list[GenerationRequest], mode: CacheMode, counts: dict[str, int]) -> None:
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(number: int, request: GenerationRequest) -> None:
        async with places:
            try:
                answer = await mesh.complete(request, cache=mode)
            except ChorusError as error:
                counts["failed"] += 1
                note(f"line {number}: {error.message}")
                return
        told = answer.cache
        if told is not None and told.outcome is CacheOutcome.BYPASSED:
            counts["failed"] += 1
            note(f"line {number}: not kept, as {told.reason}")
        else:
            counts["made" if told is not None and told.outcome is CacheOutcome.MISS else "there"] += 1

    async with asyncio.TaskGroup() as tasks:
        for number, request in enumerate(requests, start=1):
            tasks.create_task(one(number, request))


def _lines(file: Path) -> list[str]:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} can't be read: {error}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise typer.BadParameter(f"{file} holds no questions; a line is a JSON string, or an object with `prompt`")
    return lines


def _requests(lines: list[str], given: dict[str, Any]) -> list[GenerationRequest]:
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed = json.loads(line)
            fields = {"prompt": parsed} if isinstance(parsed, str) else dict(parsed)
            prompt = fields.pop("prompt")
            if "system" in fields:
                fields["instructions"] = fields.pop("system")
            if not isinstance(prompt, str) or not prompt.strip() or fields.keys() - given.keys():
                raise ValueError(f"unknown: {', '.join(sorted(fields.keys() - given.keys()))}" if fields else "no text")
            request = chat_request(prompt, **(given | fields))
        except (ValueError, TypeError, KeyError) as error:
            why = "`prompt` is missing" if isinstance(error, KeyError) else str(error)
            raise typer.BadParameter(
                f"line {number} is neither a JSON string nor an object with `prompt` and settings ({why})"
            ) from None
        found.append(replace(request, priority=Priority.BACKGROUND))
    return found


def _table(seen: MeshCache) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("coordinator", "by default", "kept", "MiB", "exact", "semantic", "joined", "missed", "checked",
                  "wrong", "tokens saved"):  # fmt: skip
        table.add_column(title, justify="left" if title in ("coordinator", "by default") else "right", no_wrap=True)
    for name, held in seen.held.items():
        counts = (held.exact_hits, held.semantic_hits, held.joined, held.misses, held.explored, held.explored_wrong,
                  held.saved_tokens)  # fmt: skip
        kept = f"{held.entries}", f"{held.size_bytes / (1 << 20):.1f}"
        table.add_row(name, held.mode, *kept, *map(str, counts))
    return table
