"""A dataset through strategies of a real mesh, by the library and by the command."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from chorus.core.errors import UnavailableError
from chorus.eval.dataset import Item, write_dataset
from chorus.eval.running import Contender, Outcome, Settings, run
from chorus.eval.scoring import Scoring
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh

ROUTE, VOTE = Contender.parse("route:fake-1b"), Contender.parse("vote:fake-1b*2")


@pytest.fixture
async def mesh(certificates: MeshCertificates) -> AsyncIterator[InProcessMesh]:
    async with InProcessMesh(runners=[FakeEngine()], certificates=certificates) as whole:
        yield whole


def items(count: int = 4) -> list[Item]:
    """Every other one is answered rightly by an engine that repeats what stands after `echo:`."""
    return [Item(f"{place}", f"echo:{place}", (str(place - place % 2),), family="echoes") for place in range(count)]


async def measured(mesh: InProcessMesh, asked: list[Item], *contenders: Contender, **more: object) -> list[Outcome]:
    async with aclosing(run(mesh.client(), asked, contenders, Settings(**more))) as told:  # type: ignore[arg-type]
        return [outcome async for outcome in told]


async def test_each_item_is_scored_for_each_strategy(mesh: InProcessMesh) -> None:
    outcomes = await measured(mesh, items(), ROUTE, VOTE)
    assert {(outcome.contender, outcome.item_id): outcome.score for outcome in outcomes} == {
        (contender.name, f"{place}"): float(place % 2 == 0) for contender in (ROUTE, VOTE) for place in range(4)
    }
    assert not [outcome.error for outcome in outcomes if outcome.error]
    assert all(outcome.tokens > 0 and outcome.confidence is not None for outcome in outcomes)


async def test_choices_are_weighed_by_their_log_probability(mesh: InProcessMesh) -> None:
    asked = [Item("a", "Which?", ("one",), choices=("one", "two")), Item("b", "Which?", ("one",))]
    outcomes = {outcome.item_id: outcome for outcome in await measured(mesh, asked, ROUTE, scoring=Scoring.CHOICE)}
    assert (outcomes["a"].error, outcomes["a"].score) == ("", 1.0)  # all tokens are as likely here; the first is taken
    assert "choices" in outcomes["b"].error
    (refused,) = await measured(mesh, asked[:1], VOTE, scoring=Scoring.CHOICE)
    assert "log-probabilities" in refused.error


async def test_one_item_that_fails_is_told_and_the_rest_goes_on(mesh: InProcessMesh) -> None:
    engine = mesh.runners[0]._engine
    assert isinstance(engine, FakeEngine)
    engine.fail_next(error=UnavailableError("the runner's word"), times=50)
    failed = await measured(mesh, items(1), ROUTE, concurrency=1)
    assert failed[0].error.startswith("UNAVAILABLE")
    assert failed[0].score == 0.0


async def test_the_command_prints_and_writes(mesh: InProcessMesh, tmp_path: Path) -> None:
    write_dataset(tmp_path / "items.jsonl", items())
    config = mesh.client_config(tmp_path)
    environ = {
        **os.environ,
        "CHORUS_MESH__TRUST_DOMAIN": config.mesh.trust_domain,
        "CHORUS_MESH__CERTS_DIR": str(tmp_path),
        "CHORUS_CLIENT__COORDINATORS": ",".join(mesh.coordinator_endpoints()),
        "CHORUS_CLIENT__IDENTITY": config.client.identity,
    }
    words = ["eval", str(tmp_path / "items.jsonl"), "-s", ROUTE.name, "-s", VOTE.name, "--json"]
    words += ["--report", str(tmp_path / "page.html"), "--out", str(tmp_path / "out.jsonl")]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chorus.cli.main", *words), stdout=asyncio.subprocess.PIPE, env=environ
    )
    try:
        printed, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    told = json.loads(printed)
    assert [row["score"]["mean"] for row in told["strategies"]] == [0.5, 0.5]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 8
    assert "vote:fake-1b*2" in (tmp_path / "page.html").read_text()
