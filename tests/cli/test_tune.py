"""`chorus tune` as people and scripts use it: what it shows, what it asks, and that nothing is kept unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from chorus.cli import tune as command
from chorus.core.tuning.proposal import Option, Proposal, propose
from chorus.core.tuning.search import Effort, Findings, Space
from chorus.local.tuning import Kept, Tuner
from chorus.models.tuning import TuningFolder
from tests.core.tuning_machine import Machine, tune, whole_space
from tests.models.test_tuning_folder import a_tuning
from tests.models.tiny import write_model

Run = Callable[..., Result]
# Eight bits lose nothing and are faster; four are faster still, and lose 22%.
MACHINE = {"speeds": {"Q8_0": 1.6, "Q4_0": 2.0, 4: 0.5, 1: 0.5}, "losses": {"Q4_0": 0.2}}


@pytest.fixture
def kept() -> list[Option]:
    """What was kept."""
    return []


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: list[Option]) -> Run:
    """Runs `chorus tune ...` on a machine of arithmetic, with a folder of its own."""
    for name in ("DATA", "STATE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("CHORUS_RUNNER__MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "models" / "tiny" / "Tiny.Q4_1.gguf")
    space, effort = whole_space(batches=(), cache_types=()), Effort(budget_s=1e9)

    def measured(_: Tuner) -> tuple[Findings, Space, Proposal]:
        findings = tune(Machine(**MACHINE), space, effort)  # type: ignore[arg-type]
        return findings, space, propose(findings, space, effort)

    def keep(tuner: Tuner, option: Option, _: Findings) -> Kept:
        kept.append(option)
        return Kept(a_tuning(), TuningFolder().keep(a_tuning()), None)

    monkeypatch.setattr(Tuner, "run", measured)
    monkeypatch.setattr(Tuner, "keep", keep)
    monkeypatch.setattr("chorus.local.tuning.busy_share", lambda: 0.0)
    return lambda *words, **how: CliRunner().invoke(command.app, [str(word) for word in words], **how)


def somebody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chorus.cli.tune._somebody_is_there", lambda: True)


def output(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_table_tells_speed_memory_and_perplexity(run: Run, kept: list[Option]) -> None:
    result = run("tiny", "--yes")
    assert result.exit_code == 0, result.output
    for text in (
        "Perplexity",
        "4 streams",
        "Memory",
        "1.60x",
        "proposed",
        "faster, but loses",
        "+22.1%",
        "requantized",
    ):
        assert text in result.stdout, text
    assert [option.variant.quantization for option in kept] == ["Q8_0"]
    assert "from their next start" in result.stderr


@pytest.mark.parametrize("flags", [(), ("--dry-run",), ("--dry-run", "--yes"), ("--json",)])
def test_nothing_is_kept_unless_somebody_says_so(run: Run, kept: list[Option], flags: tuple[str, ...]) -> None:
    result = run("tiny", *flags)
    assert result.exit_code == 0, result.output
    assert kept == []
    assert "proposed" in result.stdout


@pytest.mark.parametrize(
    ("flags", "quantization"),
    [(("--accept-loss", "10"), "Q8_0"), (("--accept-loss", "25"), "Q4_0"), ((), "Q8_0")],
)
def test_a_loss_is_taken_up_to_what_was_accepted(
    run: Run, kept: list[Option], flags: tuple[str, ...], quantization: str
) -> None:
    told = output(run("tiny", "--yes", "--json", *flags))
    assert [option.variant.quantization for option in kept] == [quantization]
    assert told["chosen"]["variant"]["quantization"] == quantization
    assert told["proposed"]["variant"]["quantization"] == "Q8_0"
    assert [option["variant"]["quantization"] for option in told["costly"]] == ["Q4_0"]
    assert told["kept"]["path"].endswith(".json")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [("n\nn\n", []), ("n\ny\n", ["Q8_0"]), ("y\ny\n", ["Q4_0"]), ("y\nn\n", []), ("n\n\n", ["Q8_0"])],
)
def test_people_are_asked(
    run: Run, kept: list[Option], monkeypatch: pytest.MonkeyPatch, answers: str, expected: list[str]
) -> None:
    somebody_is_there(monkeypatch)
    result = run("tiny", input=answers)
    assert result.exit_code == 0, result.output
    assert "Accept that loss?" in result.stderr
    assert [option.variant.quantization for option in kept] == expected
    assert ("Nothing was kept" in result.stderr) == (not expected)


def test_what_is_kept_is_shown_and_forgotten(run: Run) -> None:
    assert "Nothing is tuned yet" in run("--show").stderr
    TuningFolder().keep(a_tuning())
    shown = run("--show").stdout
    for text in ("Tiny.Q4_1", "512/256", "q8_0", "1.50x", "A CPU"):
        assert text in shown
    assert output(run("--show", "--json"))["tunings"][0]["threads"] == 3
    assert output(run("--show", "other", "--json"))["tunings"] == []
    assert "forgot Tiny.Q4_1" in run("--forget", "tiny").stdout
    assert output(run("--show", "--json"))["tunings"] == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "which model?"),
        (("--forget",), 2, "which model?"),
        (("--forget", "tiny"), 1, "nothing is tuned of 'tiny'"),
        (("--show", "--forget"), 2, "contradict"),
        (("nosuch",), 1, "no model 'nosuch'"),
        (("tiny", "--minutes", "0"), 2, "0.05"),
        (("tiny", "--only", "kitchen"), 2, "kitchen"),
        (("tiny", "--accept-loss", "much"), 2, "number"),
    ],
)
def test_mistakes_get_a_message_and_an_exit_code(run: Run, words: tuple[str, ...], code: int, message: str) -> None:
    result = run(*words)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_help_teaches(run: Run) -> None:
    told = " ".join(run("--help").stdout.split())
    for text in ("Usage", "--accept-loss", "chorus tune --show", "Perplexity is", "models list", "--dry-run"):
        assert text in told
