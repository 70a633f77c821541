"""The mesh of `chorus demo`: its own in everything but the models folder, and gone when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from chorus.client import MeshClient
from chorus.config import ChorusConfig, LoadedConfig
from chorus.core.identity import Role, SpiffeId
from chorus.local.home import MeshHome
from chorus.local.launch import Prepared, locked, prepare, while_up
from chorus.local.models import WatchPull
from chorus.local.plan import LOOPBACK, MeshPlan, UpOptions
from chorus.local.ports import DEFAULT_BASE, OTHER_BASES, find_base
from chorus.local.supervisor import Report
from chorus.local.tls_facts import TlsFacts, look
from chorus.models import DEFAULT_MODEL

_RUNNERS = 1
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class MeshFacts:
    """What is shown of a mesh besides its answer: its machines' names by node id, and its listeners' TLS by role."""

    hostnames: Mapping[str, str]
    tls: Mapping[Role, TlsFacts]


def prepare_demo(folder: Path, settings: ChorusConfig, watch_pull: WatchPull) -> Prepared:
    """Makes a mesh in `folder`, on the usual ports if they are free; of `settings` it takes what models need."""
    runner = ChorusConfig().runner.model_copy(
        update={name: getattr(settings.runner, name) for name in ("models_dir", "catalogs", "engine", "gpu_layers")}
    )
    base = LoadedConfig(ChorusConfig(runner=runner), {}, None)
    options = UpOptions(
        home=MeshHome(folder, chosen=True),
        runners=_RUNNERS,
        models=(DEFAULT_MODEL,),
        port_base=find_base(LOOPBACK, _RUNNERS, (DEFAULT_BASE, *OTHER_BASES)),
    )
    return prepare(options, base, watch_pull)


async def run_demo(
    plan: MeshPlan, report: Report, ask: Callable[[MeshClient], Awaitable[_Result]]
) -> tuple[_Result, MeshFacts]:
    """Brings the mesh up, asks it, looks at it, and takes it down. Raises as `while_up`."""

    async def work() -> tuple[_Result, MeshFacts]:
        async with MeshClient.from_config(plan.client) as mesh:
            answer = await ask(mesh)
            nodes = await mesh.list_nodes()
        hostnames = {entry.node.node_id: entry.node.hostname for entry in nodes.nodes}
        return answer, MeshFacts(hostnames, await asyncio.to_thread(_look_at_all, plan))

    with locked(plan.options.home):
        return await while_up(plan, report, work)


def _look_at_all(plan: MeshPlan) -> dict[Role, TlsFacts]:
    identity = plan.certs_dir / plan.client.client.identity
    domain = plan.client.mesh.trust_domain
    return {
        process.role: look(
            process.address.host,
            process.address.port,
            server=SpiffeId(domain, process.role, process.name),
            identity=identity,
        )
        for process in plan.processes
    }
