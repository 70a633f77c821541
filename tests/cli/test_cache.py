"""`chorus cache` and `chorus ask --cache` as programs, beside a real mesh."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chorus.cli.answering import of_the_cache
from chorus.cli.main import app
from chorus.core.cache.report import CacheOutcome, CacheReport
from chorus.testing.certificates import MeshCertificates
from chorus.testing.mesh import InProcessMesh
from tests.cli.test_events import chorus, environment


async def test_what_is_answered_ahead_is_there_shown_and_cleared(tmp_path: Path) -> None:
    lines = tmp_path / "questions.jsonl"
    lines.write_text('"echo:one"\n{"prompt": "echo:two", "max_tokens": 5}\n')
    async with asyncio.timeout(120), InProcessMesh(certificates=MeshCertificates()) as mesh:
        env = environment(mesh, tmp_path)

        async def out(*words: str) -> str:
            async with chorus(*words, env=env) as process:
                told, problems = await process.communicate()
                assert process.returncode == 0, problems.decode()
                return told.decode()

        assert await out("cache", "warm", str(lines)) == "2 answered, 0 were there already, 0 failed\n"
        told = json.loads(await out("ask", "--cache", "exact", "--json", "echo:one"))
        assert (told["text"], told["cache"]["outcome"]) == ("one", "exact")
        (held,) = json.loads(await out("cache", "show", "--json"))["coordinators"].values()
        assert (held["entries"], held["exact_hits"], held["misses"]) == (2, 1, 2)
        assert await out("cache", "clear") == "2 answers forgotten\n"


@pytest.mark.parametrize("line", ["{", '{"question": "?"}', '{"prompt": ""}', "[1]", '{"prompt": "?", "colour": 1}'])
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(f'"fine"\n{line}\n')
    result = CliRunner().invoke(app, ["cache", "warm", str(file)])
    assert result.exit_code == 2
    assert "line 2" in result.output


def test_a_person_is_told_of_what_is_not_quite_what_was_asked() -> None:
    assert of_the_cache(CacheReport(CacheOutcome.EXACT, 5.0)) == ""
    line = of_the_cache(CacheReport(CacheOutcome.SEMANTIC, 7200.0, question="Why\x1b?"))
    assert line == "the answer to “Why?”, 2 h old"
    assert of_the_cache(CacheReport(CacheOutcome.BYPASSED, reason="it acts")) == "not from the cache: it acts"
