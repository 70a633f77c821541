"""`chorus learning` as a program, beside a real mesh."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from chorus.client import ensemble_spec
from chorus.testing.certificates import MeshCertificates
from chorus.testing.mesh import InProcessMesh
from tests.cli.test_events import chorus, environment


async def test_what_was_learnt_is_shown_and_an_unknown_answer_is_not_rated(tmp_path: Path) -> None:
    mesh = InProcessMesh(ensemble={"learning": "watch"}, certificates=MeshCertificates())
    async with asyncio.timeout(120), mesh:
        await mesh.client().complete("echo:hi", ensemble=ensemble_spec("vote"))
        env = environment(mesh, tmp_path)
        async with chorus("learning", "show", "--json", env=env) as process:
            told, _ = await process.communicate()
        (own,) = json.loads(told)["coordinators"].values()
        assert (own["mode"], own["frozen"]) == ("watch", False)
        assert [(one["context"], one["strategy"], one["count"]) for one in own["earned"]] == [("simple", "vote", 1.0)]
        async with chorus("learning", "rate", "nobodys", "1", env=env) as process:
            _, problems = await process.communicate()
        assert process.returncode == 1
        assert b"no such answer" in problems
        assert b"Traceback" not in problems
