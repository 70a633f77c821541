"""`chorus k8s`: the mesh in Kubernetes."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from chorus.cli.options import ConfigFile
from chorus.cli.output import handles_errors, note

app = typer.Typer(
    help="The mesh in Kubernetes: what runs beside the services in a cluster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

_IN_CLUSTER = "Inside a cluster (the manifests start these)"


@app.command(rich_help_panel=_IN_CLUSTER)
@handles_errors
def issue(
    runners: Annotated[
        list[str] | None,
        typer.Option(
            "--runner",
            metavar="NAME",
            help="A runner's name besides those of the nodes; again for more.",
            show_default=False,
        ),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Make the mesh's authority and the certificates that are missing, as Secrets of this pod's namespace.

    Runners are the nodes labelled chorus.mesh/runner=true. Run again, it renews what has lived two thirds of its time.
    """
    from chorus.config import load_config
    from chorus.identity.ca import now_utc
    from chorus.identity.policy import load_policy
    from chorus.k8s.cluster import Cluster
    from chorus.k8s.issuing import Issuer

    mesh = load_config(file=config).mesh
    issuer = Issuer(Cluster.in_pod(), load_policy(), trust_domain=mesh.trust_domain, now=now_utc())
    issued = issuer.run(runners or ())
    for identity in issued.made:
        note(f"issued {identity}")
    for name in issued.refused:
        note(
            f"[yellow]no runner can be called {name!r}: lower-case letters, digits and dashes alone. "
            "Give the node another name (k3s --node-name)[/yellow]"
        )
    note(f"{len(issued.made)} issued, {len(issued.kept)} good for longer")


@app.command(rich_help_panel=_IN_CLUSTER)
@handles_errors
def leaf(
    runner: Annotated[str, typer.Argument(metavar="RUNNER", help="The runner's name.", show_default=False)],
    source: Annotated[Path, typer.Option("--from", metavar="DIR", help="Where the Secret of all leaves is mounted.")],
    target: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where the runner looks for its own.")],
) -> None:
    """Hand one runner's certificate over to its container, and no other one's."""
    from chorus.k8s.leaves import take_leaf

    take_leaf(runner, source, target)
    sys.stdout.write(f"{target}\n")


@app.command("watch-nodes", rich_help_panel=_IN_CLUSTER)
@handles_errors
def watch_nodes(
    not_ready_after_s: Annotated[
        float, typer.Option("--not-ready-after-s", min=0, help="Seconds for which a node has to be not ready.")
    ] = 30.0,
) -> None:
    """Drain the runner of every node that is cordoned or not ready, by a label; bring it back afterwards."""
    from chorus.config import LogSettings
    from chorus.k8s.cluster import Cluster
    from chorus.k8s.draining import NodeWatcher
    from chorus.telemetry.logs import configure_logging

    def stop(_number: int, _frame: object) -> NoReturn:
        raise typer.Exit

    # As a container's first process it would ignore SIGTERM otherwise.
    signal.signal(signal.SIGTERM, stop)
    with configure_logging(service="watch-nodes", **dict(LogSettings())):
        NodeWatcher(Cluster.in_pod(), not_ready_after_s=not_ready_after_s, clock=time.monotonic, sleep=time.sleep).run()
