"""The `chorus` command's top level: what there is, where it is, and what its exit codes mean."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from chorus import __version__
from chorus.cli.lazy import Entry, LazyGroup

_EVERY_DAY = "Every day"
_MESH = "A mesh on this machine"
_SERVICES = "One service at a time"
_SETUP = "Models, certificates, configuration"

ENTRIES = (
    Entry("up", "chorus.cli.up:up", "Start a mesh on this machine: registry, runners, coordinator.", _MESH),
    Entry("down", "chorus.cli.down:down", "Stop the mesh on this machine.", _MESH),
    Entry("demo", "chorus.cli.demo:demo", "See it all once: a mesh of its own, one answer.", _MESH),
    Entry("join", "chorus.cli.join:join", "Join a mesh with the line that `chorus token create` printed.", _MESH),
    Entry("doctor", "chorus.cli.doctor:doctor", "Find out what is wrong on this machine and what to do.", _MESH),
    Entry("ask", "chorus.cli.ask:ask", "Ask one question; the answer is streamed as it is written.", _EVERY_DAY),
    Entry("chat", "chorus.cli.chat:chat", "Talk with a model, turn by turn.", _EVERY_DAY),
    Entry("rerank", "chorus.cli.rerank:rerank", "Order documents by how well they answer a query.", _EVERY_DAY),
    Entry("status", "chorus.cli.status:status", "Show nodes, runners, models and load.", _EVERY_DAY),
    Entry("events", "chorus.cli.events:events", "Show what happens in the mesh, live.", _EVERY_DAY),
    Entry("stats", "chorus.cli.stats:stats", "Show how requests fared: latency, errors, who answered.", _EVERY_DAY),
    Entry("costs", "chorus.cli.costs:costs", "Show what requests cost, and what they avoided.", _EVERY_DAY),
    Entry("learning", "chorus.cli.learning:app", "What is learnt of models and strategies.", _EVERY_DAY),
    Entry("key", "chorus.cli.key:app", "Let people and programs in without a certificate: API keys.", _EVERY_DAY),
    Entry("cache", "chorus.cli.cache:app", "Show, fill and clear the cache of answers.", _EVERY_DAY),
    Entry("eval", "chorus.cli.eval:evaluate", "Measure strategies on a dataset of questions.", _EVERY_DAY),
    Entry("explain", "chorus.cli.explain:explain", "Show which runner would answer, and why no other one.", _EVERY_DAY),
    Entry("models", "chorus.cli.models:app", "Fetch, list and remove models; see what fits this machine.", _SETUP),
    Entry("tune", "chorus.cli.tune:app", "Measure how a model runs best on this machine.", _SETUP),
    Entry("service", "chorus.cli.service:app", "Serve in the mesh from every start of this machine on.", _SETUP),
    Entry("token", "chorus.cli.token:app", "Let machines join: make, list and revoke join tokens.", _SETUP),
    Entry("certs", "chorus.cli.certs:app", "Make, show and check the certificates of a mesh.", _SETUP),
    Entry("audit", "chorus.cli.audit:app", "Show who did what, and check that nobody changed it.", _SETUP),
    Entry("config", "chorus.cli.config:app", "Show the configuration in use, and describe its keys.", _SETUP),
    Entry("version", "chorus.cli.version:version", "Show the versions of Chorus and of what it stands on.", _SETUP),
    Entry("k8s", "chorus.cli.k8s:app", "Run the mesh in Kubernetes: K3s and others.", _SETUP),
    Entry("registry", "chorus.cli.services:registry", "Run a registry.", _SERVICES),
    Entry("runner", "chorus.cli.services:runner", "Run a runner.", _SERVICES),
    Entry("coordinator", "chorus.cli.services:coordinator", "Run a coordinator.", _SERVICES),
    Entry("identity", "chorus.cli.services:identity", "Run the identity service.", _SERVICES),
)

_EPILOG = """\
[bold]First steps[/bold]
  chorus up -d                       [dim]start a mesh with a small model[/dim]
  chorus ask "Why is the sky blue?"  [dim]the first answer[/dim]
  chorus status --watch              [dim]who runs what; Ctrl-C leaves[/dim]
  chorus models suggest              [dim]larger models that fit this machine[/dim]
  chorus down                        [dim]stop it all[/dim]

[bold]Exit codes[/bold]
  0 done   1 failed   2 wrong usage or configuration
  3 works in part (status)   130 interrupted

[bold]Environment[/bold]
  CHORUS_HOME    [dim]folder of the local mesh[/dim]
  CHORUS_CONFIG  [dim]TOML file to read; `chorus config docs` lists its keys[/dim]
  CHORUS_DEBUG   [dim]1 shows tracebacks[/dim]
"""


class Commands(LazyGroup):
    """The top level with its commands."""

    entries = ENTRIES


app = typer.Typer(
    cls=Commands,
    name="chorus",
    help="Unequal machines, one private LLM service.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"chorus {__version__}\n")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Unequal machines, one private LLM service."""


def main() -> None:
    """Runs the command line; the entry point of the package."""
    app(prog_name="chorus")


if __name__ == "__main__":
    main()
