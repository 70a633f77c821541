"""`chorus demo`: the whole path once, from certificates to an answer."""

from __future__ import annotations

import asyncio
import shlex
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from chorus.cli.answering import Answer, stream_text
from chorus.cli.connecting import AsJson
from chorus.cli.options import ConfigFile
from chorus.cli.output import console, err, print_json
from chorus.cli.pull_progress import PullBar
from chorus.cli.up_view import UpView
from chorus.client import MeshClient
from chorus.config import ChorusConfig, load_config
from chorus.core.identity import Role, SpiffeId
from chorus.local.demo import MeshFacts, prepare_demo, run_demo
from chorus.local.events import Ended, Serving, SupervisorEvent
from chorus.local.home import MeshHome

_QUESTION = "Why do people sing together? Answer in two sentences."
_MAX_TOKENS = 120


def demo(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")] = _QUESTION,
    as_json: AsJson = False,
    config: ConfigFile = None,
) -> None:
    """See it all once: certificates, a registry, a runner and a coordinator as processes of their own, one answer.

    It uses other ports where the usual ones are taken, keeps nothing but the model, and stops everything at the end.
    """
    settings = load_config(file=config)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chorus-demo-") as folder:
        prepared = prepare_demo(Path(folder), settings, PullBar)
        view = UpView(MeshHome(Path(folder), chosen=True), as_json=as_json)
        if not as_json:
            err().print(f"[dim]made {prepared.issued} certificates; starting registry, runner and coordinator[/]")
        view.begin([process.name for process in prepared.plan.processes])

        async def ask(mesh: MeshClient) -> Answer:
            view.end()
            generation = mesh.generate(prompt, max_tokens=_MAX_TOKENS, temperature=0)
            if as_json:
                answer = Answer()
                async with generation:
                    async for event in generation:
                        answer.take(event)
                return answer
            err().print(f"[dim]they serve after {time.monotonic() - began:.1f} s, mutual TLS between them[/]\n")
            console().print(Text(f"> {prompt}", style="bold"))
            return await stream_text(generation)

        def report(event: SupervisorEvent) -> None:
            if isinstance(event, Ended) or (isinstance(event, Serving) and not as_json):
                view.see(event)

        try:
            answer, facts = asyncio.run(run_demo(prepared.plan, report, ask))
        finally:
            view.end()
    if as_json:
        print_json({**answer.to_json(), "tls": {role: asdict(seen) for role, seen in facts.tls.items()}})
    else:
        _show(answer, facts)
        _show_next(settings)


def _show(answer: Answer, facts: MeshFacts) -> None:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    host = facts.hostnames.get(answer.node_id, "")
    table.add_row("served by", f"{answer.runner_id} on {host} ({answer.node_id}), through the coordinator")
    if answer.started is not None:
        about = answer.started.started
        table.add_row("model", f"{about.artifact}, sha256 {about.artifact_sha256[:12]}…")
    if answer.finished is not None:
        timings, usage = answer.finished.timings, answer.finished.usage
        first = f"first token after {answer.first_token_s or 0:.2f} s"
        table.add_row(
            "speed", f"{first}, then {timings.tokens_per_second:.1f} tokens/s ({usage.completion_tokens} tokens)"
        )
    for label, seen in zip(("TLS", *[""] * len(facts.tls)), facts.tls.values(), strict=False):
        table.add_row(label, f"{seen.peer}  {seen.version}")
    ciphers = sorted({seen.cipher for seen in facts.tls.values()})
    strangers = all(seen.refuses_strangers for seen in facts.tls.values())
    table.add_row(
        "", f"{', '.join(ciphers)}; {'nobody is' if strangers else 'ANYBODY IS'} let in without a certificate"
    )
    err().print()
    console().print(table)


def _show_next(settings: ChorusConfig) -> None:
    certs = settings.mesh.certs_dir
    name = SpiffeId(settings.mesh.trust_domain, Role.COORDINATOR, "coordinator").dns_name
    own = certs / settings.client.identity
    grpcurl = " ".join(
        [
            "grpcurl",
            f"-cacert {shlex.quote(str(certs / 'ca.crt'))}",
            f"-cert {shlex.quote(str(own / 'tls.crt'))}",
            f"-key {shlex.quote(str(own / 'tls.key'))}",
            f"-servername {name} {settings.client.coordinators[0].authority} list",
        ]
    )
    err().print("\n[dim]next[/]")
    for command, about in (
        ("chorus up -d", "a mesh that stays"),
        ('chorus ask "Why is the sky blue?"', ""),
        ("chorus status --watch", ""),
        (grpcurl, ""),
    ):
        err().print(Text.assemble("  ", (command, "cyan"), f"   {about}" if about else ""), soft_wrap=True)
