"""`chorus models` as people and scripts use it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from chorus.cli import models as command
from chorus.core.fleet.records import Cpu, Gpu, Node
from chorus.models.catalog import DEFAULT_MODEL, Catalog
from tests.models.test_catalog import MINE
from tests.models.tiny import TOOL_TEMPLATE, write_model

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `chorus models ...` on a folder of its own."""
    monkeypatch.setenv("CHORUS_RUNNER__MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return lambda *words, **how: CliRunner().invoke(command.app, [str(word) for word in words], **how)


def output(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_model(tmp_path / "Tiny-Test.Q8_0.gguf", template=TOOL_TEMPLATE)


def test_pull_list_show_remove(run: Run, tiny: Path, tmp_path: Path) -> None:
    assert "No models yet" in run("list").stderr
    pulled = run("pull", tiny)
    assert pulled.exit_code == 0
    path = tmp_path / "models" / "tiny-test" / "Tiny-Test.Q8_0.gguf"
    assert pulled.stdout.split() == ["Tiny-Test.Q8_0", str(path)]
    listed = run("list").stdout
    for text in ("Tiny-Test.Q8_0", "tiny-test", "Q8_0", "chat, tools", "mit"):
        assert text in listed
    shown = run("show", "tiny-test").stdout
    for text in ("sha256", "2048", str(path), "weights", "yes"):
        assert text in shown
    assert run("rm", "tiny-test").exit_code == 2, "nobody there to ask"
    assert path.exists()
    removed = run("rm", "--yes", "tiny-test")
    assert removed.exit_code == 0
    assert f"removed {path}" in removed.stdout
    assert not path.exists()


def test_json_is_whole_and_alone_on_standard_output(run: Run, tiny: Path) -> None:
    (pulled,) = output(run("pull", "--json", tiny))
    assert pulled["name"] == "Tiny-Test.Q8_0"
    listed = output(run("list", "--json"))
    assert listed["models"] == [pulled]
    assert listed["broken"] == []
    shown = output(run("show", "--json", "tiny-test"))
    assert shown["memory"]["total_bytes"] > shown["memory"]["weights_bytes"]
    assert {entry["family"] for entry in output(run("list", "--all", "--json"))["models"]} == {
        family.name for family in Catalog.load().families
    }
    assert output(run("show", "--json", DEFAULT_MODEL))["here"] is False
    assert len(output(run("rm", "--yes", "--json", "tiny-test"))["removed"]) == 2


def test_the_catalog_says_what_is_here(run: Run) -> None:
    assert run("pull", DEFAULT_MODEL).exit_code == 0
    here = {entry["family"] for entry in output(run("list", "--all", "--json"))["models"] if entry["here"]}
    assert here == {DEFAULT_MODEL}
    assert DEFAULT_MODEL in run("list", "--all").stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("pull", "nosuch"), 1, f"no model 'nosuch'; it has {DEFAULT_MODEL}"),
        (("pull", "missing.gguf"), 1, "missing.gguf can't be read"),
        (("pull", "ftp://example.org/m.gguf"), 2, "not known"),
        (("pull", "http://example.org/m.gguf"), 2, "not encrypted"),
        (("pull", "--sha256", "abc", DEFAULT_MODEL), 2, "64"),
        (("pull", "--copy", "--reference", DEFAULT_MODEL), 2, "contradict"),
        (("pull", "--sha256", "abc", "a", "b"), 2, "one model at a time"),
        (("pull",), 2, "NAME"),
        (("show", "nosuch"), 1, "neither in"),
        (("rm", "-y", "nosuch"), 1, "no model 'nosuch'"),
        (("suggest", "--context", "1"), 2, "256"),
        (("list", "--catalog", "missing.toml"), 2, "missing.toml can't be read"),
    ],
)
def test_mistakes_get_a_message_and_an_exit_code(run: Run, words: tuple[str, ...], code: int, message: str) -> None:
    result = run(*words)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_a_wrong_digest_ends_in_an_error(run: Run, tiny: Path) -> None:
    result = run("pull", "--sha256", "0" * 64, tiny)
    assert result.exit_code == 1
    assert "error: Tiny-Test.Q8_0.gguf has the SHA-256" in " ".join(result.stderr.split())


def test_removing_asks_where_somebody_is_there(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("pull", tiny)
    monkeypatch.setattr(command, "_somebody_is_there", lambda: True)
    assert run("rm", "tiny-test", input="n\n").exit_code == 1
    assert len(output(run("list", "--json"))["models"]) == 1
    assert run("rm", "tiny-test", input="y\n").exit_code == 0
    assert output(run("list", "--json"))["models"] == []


def test_broken_files_are_shown_and_can_be_removed(run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "models" / "broken.gguf"
    broken.parent.mkdir()
    broken.write_text("no model")
    assert "not a GGUF" in run("list").stderr
    assert run("rm", "-y", "broken.gguf").exit_code == 0
    assert not broken.exists()


def test_a_reference_stays_where_it_is(run: Run, tiny: Path) -> None:
    (pulled,) = output(run("pull", "--reference", "--json", tiny))
    assert (pulled["path"], pulled["referenced"]) == (str(tiny), True)
    assert run("rm", "-y", "tiny-test").exit_code == 0
    assert tiny.exists()


def test_a_catalog_of_ones_own(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text(MINE)
    by_flag = output(run("list", "--all", "--json", "--catalog", tmp_path / "mine.toml"))["models"]
    assert "mine" in {entry["family"] for entry in by_flag}
    monkeypatch.setenv("CHORUS_RUNNER__CATALOGS", str(tmp_path / "mine.toml"))
    assert output(run("show", "--json", "mine"))["name"] == "Mine.Q8_0"


def a_machine(*gpus: Gpu) -> Node:
    return Node("this", "desk", "Linux x86_64", Cpu("A CPU", 8, 16), 32 << 30, 30 << 30, gpus)


def test_suggestions_for_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(0, "uuid", "RTX 3080", 10 << 30, 9 << 30)
    monkeypatch.setattr(command, "_this_machine", lambda: a_machine(gpu))
    models = {entry["family"]: entry for entry in output(run("suggest", "--json"))["models"]}
    assert models["qwen3-8b"]["verdict"] == "recommended"
    assert models["qwen3-8b"]["place"] == "GPU 0"
    assert models["qwen2.5-coder-7b-instruct"]["verdict"] == "recommended"
    assert models["nomic-embed-text-v1.5"]["verdict"] == "recommended"
    assert models["qwen3-14b"]["place"] == "CPU"
    table = run("suggest").stdout
    assert "RTX 3080" in table
    assert "recommended" in table


def test_more_context_needs_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_this_machine", a_machine)
    short, long = (
        {m["family"]: m["needed_bytes"] for m in output(run("suggest", "--json", "--context", tokens))["models"]}
        for tokens in (4096, 8192)
    )
    assert all(long[family] > short[family] for family in short if family != "nomic-embed-text-v1.5")


def test_suggestions_for_this_machine(run: Run) -> None:
    told = output(run("suggest", "--json"))
    assert told["node"]["memory_total_bytes"] > 0
    assert len(told["models"]) == len(Catalog.load().entries())


@pytest.mark.parametrize("name", ["list", "suggest", "pull", "show", "rm"])
def test_help_teaches(run: Run, name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    assert "--json" in result.stdout
    if name in ("pull", "suggest"):
        assert f"chorus models {name}" in result.stdout
