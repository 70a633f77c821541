"""Checks of the mesh: certificates, ports, what runs here, and what the coordinator says."""

from __future__ import annotations

import asyncio
from datetime import datetime
from pathlib import Path

from chorus.client import MeshClient
from chorus.config import ChorusConfig
from chorus.core.errors import ChorusError, ConfigError
from chorus.core.findings import Finding, Findings, fail, ok, warn
from chorus.identity.inspection import find, inspect
from chorus.identity.policy import load_policy
from chorus.local.home import MeshHome
from chorus.local.overview import Overview
from chorus.local.plan import LOOPBACK
from chorus.local.ports import Ports, check_free
from chorus.local.state import MeshState

_TIMEOUT_S = 3.0


def check_certificates(directory: Path, now: datetime) -> Findings:
    """Whether the certificates here work, and go on doing so for a while."""
    if not directory.is_dir():
        yield ok("certificates", f"none in {directory} yet", "`chorus up` or `chorus certs init` makes them")
        return
    try:
        reports = [inspect(path, now=now, warn=load_policy().warn) for path in find(directory)]
    except ChorusError as error:
        yield fail("certificates", str(error), "`chorus certs init`, or mesh.certs_dir names another folder")
        return
    for report in reports:
        name = report.path.parent.name if not report.is_authority else "the authority"
        for problem in report.problems:
            # "what is wrong; what to do" is how these are written.
            message, _, advice = problem.text.partition("; ")
            make = fail if problem.is_error else warn
            yield make("certificates", f"{name}: {message}", advice or "`chorus certs verify` tells more")
    ends = [report.not_after for report in reports if report.not_after is not None]
    if ends and not any(report.problems for report in reports):
        yield ok("certificates", f"{len(reports)} in {directory}, good until {min(ends):%Y-%m-%d}")


def check_local(home: MeshHome) -> Findings:
    """What `chorus up` started here, or whether it could."""
    try:
        state = MeshState.read(home.state_file)
    except ConfigError as error:
        yield fail("local mesh", str(error), f"rm {home.state_file}")
        return
    if state is None:
        yield ok("local mesh", "none is up", "`chorus up` starts one")
        yield from _check_ports()
    elif not state.alive:
        yield warn(
            "local mesh", "its supervisor was killed", "`chorus up` starts it again, `chorus down` clears it away"
        )
    else:
        down = [process for process in state.processes if process.phase == "down"]
        for process in down:
            yield fail(
                "local mesh", f"{process.name} {process.last_end} and is left down", f"see {process.log}; `chorus up`"
            )
        if not down:
            yield ok(
                "local mesh", f"{state.phase}, {len(state.processes)} processes (supervisor: {state.supervisor.pid})"
            )


def _check_ports() -> Findings:
    ports = Ports()
    wanted = {"registry": ports.registry, "runner-1": ports.runner(0), "runner-2": ports.runner(1)}
    wanted |= {"coordinator": ports.coordinator}
    try:
        check_free(LOOPBACK, wanted)
    except ConfigError as error:
        message, _, advice = error.message.partition(". ")
        yield warn("ports", message, advice)
    else:
        yield ok("ports", f"{', '.join(map(str, wanted.values()))} are free")


def check_reachable(config: ChorusConfig, home: MeshHome) -> Findings:
    """Whether the mesh that this machine is configured for answers, and what is wrong with it."""
    return iter(asyncio.run(_ask_mesh(config, home)))


async def _ask_mesh(config: ChorusConfig, home: MeshHome) -> list[Finding]:
    where = ", ".join(map(str, config.client.coordinators))
    try:
        async with MeshClient.from_config(config) as mesh, asyncio.timeout(_TIMEOUT_S):
            overview = Overview(await mesh.list_nodes(), MeshState.read(home.state_file))
    except TimeoutError:
        return [fail("mesh", f"{where} does not answer within {_TIMEOUT_S:.0f} s", "look at the coordinator's log")]
    except ChorusError as error:
        return [fail("mesh", str(error), "`chorus up` starts one here; client.coordinators says where else one is")]
    problems = overview.problems()
    found = [warn("mesh", problem, "`chorus status` shows all of it") for problem in problems]
    if not problems:
        runners = sum(len(node.runners) for node in overview.seen.nodes)
        found.append(ok("mesh", f"{where} answers; {runners} runners on {len(overview.seen.nodes)} nodes"))
    return found
