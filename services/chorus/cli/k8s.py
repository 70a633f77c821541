"""`chorus k8s`: the mesh in Kubernetes."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from chorus import __version__
from chorus.cli.connecting import AsJson
from chorus.cli.lazy import group
from chorus.cli.options import ConfigFile
from chorus.cli.output import handles_errors, note
from chorus.core.cluster.layout import Certificates, Extra, lay_out
from chorus.core.errors import ConfigError, InvalidRequestError

app = group(
    help="The mesh in Kubernetes: an overlay for one's own nodes, what is wrong in a cluster, and what runs in it.",
)

_MODELS = ("smollm2-135m-instruct",)
_IN_CLUSTER = "Inside a cluster (the manifests start these)"


@app.command()
@handles_errors
def render(
    target: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write; it may not be there yet.")],
    nodes: Annotated[
        list[str] | None,
        typer.Option("--node", metavar="NODE", help="Runs models; again for each. As `kubectl get nodes` says."),
    ] = None,
    gpu_nodes: Annotated[
        list[str] | None,
        typer.Option("--gpu-node", metavar="NODE", help="Runs models, on an NVIDIA GPU; again for each."),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="MODEL", help="Fetched to each node; again for more. Default: SmolLM2."),
    ] = None,
    certificates: Annotated[
        Certificates,
        typer.Option(
            "--certificates",
            help="Who makes them. identity: runners make their keys themselves, and join. selfsigned: a Job makes all "
            "keys, those of runners in one Secret. cert-manager.",
        ),
    ] = Certificates.IDENTITY,
    extras: Annotated[
        list[Extra] | None,
        typer.Option(
            "--with",
            help="observability: the Prometheus operator is there. ingress: through K3s' Traefik. callers: people and "
            "programs with API keys, on port 7303 of every node. valkey: one server for what coordinators share.",
        ),
    ] = None,
    image: Annotated[
        str, typer.Option("--image", metavar="NAME:TAG", help="The image; that for GPUs has -cuda behind its tag.")
    ] = f"localhost/chorus:{__version__}",
    replace: Annotated[bool, typer.Option("--replace", help="Write anew what an earlier render wrote.")] = False,
) -> None:
    """Write the manifests of a mesh for your nodes and models, to be applied with `kubectl apply -k`.

    chorus k8s render --to mesh --gpu-node desktop --node laptop --node attic --model qwen2.5-3b-instruct
    """
    from chorus.k8s.rendering import label_commands, write_overlay

    layout = lay_out(nodes or (), gpu_nodes or (), models or _MODELS, certificates=certificates, extras=extras or ())
    write_overlay(layout, image, target, replace=replace)
    count = len(layout.nodes)
    what = f"{count} node{'s' if count != 1 else ''}, {', '.join(layout.components)}"
    note(f"{what}; next, with the image on every node:")
    for command in (*label_commands(layout), f"kubectl apply -k {target}", "chorus k8s doctor"):
        note(f"  {command}")
    sys.stdout.write(f"{target}\n")


@app.command()
@handles_errors
def doctor(
    namespace: Annotated[str, typer.Option("--namespace", "-n", metavar="NAME", help="Where the mesh is.")] = "chorus",
    context: Annotated[
        str | None,
        typer.Option("--context", metavar="NAME", help="The cluster, as kubectl knows it.", show_default=False),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="PATH",
            help="Ask no cluster, but read what `kubectl get ... -o json` printed: a file, a folder of .json, or -.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find out what is wrong with the mesh in a cluster, and what to do: nodes, GPUs, DNS, certificates, pods.

    It reads by kubectl, and changes nothing. Of Secrets it reads certificates, and no key. What it was not let see it
    says. Exit codes: 0 nothing is broken, 1 something is.
    """
    from chorus.cli.doctor import report
    from chorus.core.cluster.diagnosis import diagnose
    from chorus.k8s.documents import cluster_facts
    from chorus.k8s.reading import ask_kubectl, read_saved

    told = ask_kubectl(namespace, context=context) if source is None else read_saved(source)
    for why in told.refused:
        note(f"not told of {why}")
    report(diagnose(cluster_facts(told.documents, namespace, told.kinds), now=time.time()), as_json=as_json)


@app.command(rich_help_panel=_IN_CLUSTER)
@handles_errors
def issue(
    runners: Annotated[
        list[str] | None,
        typer.Option(
            "--runner",
            metavar="NAME",
            help="A runner that joins, in place of those named as the nodes are; again for more. With --tokens.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        bool,
        typer.Option("--tokens", help="Lay tokens ready with which runners join, in place of keys for them."),
    ] = False,
    valkey: Annotated[
        bool, typer.Option("--valkey", help="Make the password of the Valkey server that coordinators share, once.")
    ] = False,
    callers: Annotated[
        bool, typer.Option("--callers", help="Make the pepper of the coordinators' API keys, once.")
    ] = False,
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

    if runners and not tokens:
        raise InvalidRequestError("--runner", "takes --tokens: no key can be made for a runner whose node isn't known")
    mesh = load_config(file=config).mesh
    cluster = Cluster.in_pod()
    issuer = Issuer(cluster, load_policy(), trust_domain=mesh.trust_domain, now=now_utc())
    issued = issuer.run(leaves=not tokens)
    for identity in issued.made:
        note(f"issued {identity}")
    for name in issued.refused:
        note(
            f"[yellow]no runner can be called {name!r}: lower-case letters, digits and dashes alone. "
            "Give the node another name (k3s --node-name)[/yellow]"
        )
    note(f"{len(issued.made)} issued, {len(issued.kept)} good for longer")
    if valkey or callers:
        from chorus.k8s.made_once import make_callers_secret, make_valkey_secret
        from chorus.k8s.secrets import Secrets

        secrets = Secrets(cluster)
        if valkey:
            note("a password for Valkey made" if make_valkey_secret(secrets) else "Valkey has its password")
        if callers:
            note("a pepper for API keys made" if make_callers_secret(secrets) else "API keys have their pepper")
    if tokens:
        from chorus.k8s.enrolling import invite_with

        # A StatefulSet's runner says where it is when it joins; a DaemonSet's is called as its node.
        wanted = dict.fromkeys(runners, "") if runners else {name: name for name in issued.runners}
        done = asyncio.run(invite_with(cluster, mesh.identity_service, wanted, time.time()))
        note(f"tokens: {len(done.invited)} made, {len(done.kept)} lie ready, {len(done.withdrawn)} taken away")


@app.command(rich_help_panel=_IN_CLUSTER)
@handles_errors
def join(
    source: Annotated[Path, typer.Option("--tokens", metavar="DIR", help="Where the Secret of all tokens is mounted.")],
    config: ConfigFile = None,
) -> None:
    """Get this runner its certificate, by the token laid ready for it, unless its node has one already.

    runner.name, runner.node_id, mesh.renewal and mesh.certs_dir are those of the runner itself.
    """
    from chorus.config import load_config
    from chorus.k8s.enrolling import join_once

    settings = load_config(file=config)
    name, certs = settings.runner.name, settings.mesh.certs_dir
    node = settings.runner.node_id
    if name is None or node is None or settings.mesh.renewal is None:
        raise ConfigError(
            "runner.name says who joins, runner.node_id from which node, mesh.renewal where; set all three"
        )
    joined = join_once(name, node, source, settings.mesh.renewal, certs)
    note(f"{name} has joined" if joined else f"{name} has joined before")
    sys.stdout.write(f"{certs}\n")


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
