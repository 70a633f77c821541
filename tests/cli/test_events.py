"""`chorus events` and `chorus stats` as programs, beside a real mesh."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chorus.cli.event_lines import event_line
from chorus.cli.main import app
from chorus.core.errors import EngineError
from chorus.core.events import KIND_OF, AttemptFailed, Event, EventKind, RequestRefused, Subject
from chorus.core.generation import GenerationRequest, TextPrompt
from chorus.core.placement import Work
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh

HELLO = GenerationRequest("", TextPrompt("echo:hello"))


def environment(mesh: InProcessMesh, folder: Path) -> dict[str, str]:
    config = mesh.client_config(folder)
    return {
        **os.environ,
        "CHORUS_MESH__TRUST_DOMAIN": config.mesh.trust_domain,
        "CHORUS_MESH__CERTS_DIR": str(folder),
        "CHORUS_CLIENT__COORDINATORS": ",".join(mesh.coordinator_endpoints()),
        "CHORUS_CLIENT__IDENTITY": config.client.identity,
    }


@asynccontextmanager
async def chorus(*words: str, env: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command, ended with the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chorus.cli.main", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def line_with(process: asyncio.subprocess.Process, words: str) -> str:
    assert process.stdout is not None
    async for line in process.stdout:
        if words in line.decode():
            return line.decode()
    raise AssertionError(f"it ended without {words}")


async def test_events_live_as_json_until_ctrl_c(tmp_path: Path) -> None:
    async with InProcessMesh(certificates=MeshCertificates()) as mesh, asyncio.timeout(60):
        env = environment(mesh, tmp_path)
        async with chorus("events", "--json", "--since", "1h", env=env) as process:
            joined = json.loads(await line_with(process, "RUNNER_JOINED"))
            assert joined["coordinator"] == mesh.coordinator_endpoints()[0]
            assert joined["event"]["runner_id"] == "runner-1"
            completion = await mesh.client(name="cli").complete(HELLO)
            finished = json.loads(await line_with(process, "REQUEST_FINISHED"))["event"]
            assert finished["request_id"] == completion.request_id
            assert finished["request_finished"]["output_token_count"] == completion.usage.completion_tokens
            process.send_signal(signal.SIGINT)
            _, problems = await process.communicate()
        assert process.returncode == 130
        assert b"Traceback" not in problems


async def test_events_as_lines_of_chosen_kinds_over_a_restart(tmp_path: Path) -> None:
    async with InProcessMesh(certificates=MeshCertificates()) as mesh, asyncio.timeout(60):
        env = environment(mesh, tmp_path)
        async with chorus(
            "events", "--kind", "runner", "--kind", "request-finished", "--since", "1h", env=env
        ) as process:
            assert "runner-1 (node-of-runner-1) at" in await line_with(process, "runner joined")
            await mesh.restart_coordinator()
            assert "restarted" in await line_with(process, "-- events")
            assert "runner-1" in await line_with(process, "runner joined")
            process.send_signal(signal.SIGINT)
            _, problems = await process.communicate()
        told = problems.decode()
        assert "cannot be watched now" in told
        assert told.count("watching coordinator-1") == 2


async def test_stats_for_people_and_for_programs(tmp_path: Path) -> None:
    engine = FakeEngine()
    settings = {"max_attempts": 1}
    async with (
        InProcessMesh(runners=[engine], certificates=MeshCertificates(), coordinator=settings) as mesh,
        asyncio.timeout(60),
    ):
        env = environment(mesh, tmp_path)
        client = mesh.client()
        await client.complete(HELLO)
        engine.fail_next()
        with pytest.raises(EngineError):
            await client.complete(HELLO)
        async with chorus("stats", env=env) as process:
            text = (await process.communicate())[0].decode()
        assert process.returncode == 0
        assert "2 requests" in text
        assert "100% of the answers by this mesh's own engines" in text
        assert "1 ENGINE_FAILED" in text
        async with chorus("stats", "--json", env=env) as process:
            found = json.loads((await process.communicate())[0])
        assert (found["total"]["completed"], found["total"]["failed"]) == (1, {"ENGINE_FAILED": 1})
        assert set(found["nodes"]) == {"node-of-runner-1"}
        assert found["total"]["first_token_s"]["p50"] > 0


@pytest.mark.parametrize(
    ("words", "problem"), [(["--kind", "nonsense"], "no kind of event"), (["--since", "soon"], "such as 30s")]
)
def test_wrong_usage_says_what_is_right(words: list[str], problem: str) -> None:
    result = CliRunner().invoke(app, ["events", *words])
    assert result.exit_code == 2
    assert problem in " ".join(result.output.replace("│", " ").split())


def test_a_line_holds_nothing_that_steers_a_terminal() -> None:
    details = (
        RequestRefused(Work.GENERATE, "UNKNOWN_MODEL", "no \x1b[31mmodel\n", 1.0),
        AttemptFailed(1, "ENGINE_FAILED", "a\rb", True),
    )
    for detail in details:
        subject = Subject("id\x07", "spiffe://mesh/client/ann", "m\x1b]0;x\x07", "", "runner", "node")
        line = event_line(Event(1, datetime.now(UTC).timestamp(), KIND_OF[type(detail)], subject, detail)).plain
        assert line.isprintable()
        assert detail.reason in line


def test_every_kind_has_a_line() -> None:
    for kind in EventKind:
        assert "runner-7" in event_line(Event(1, 0.0, kind, Subject(runner_id="runner-7"))).plain
