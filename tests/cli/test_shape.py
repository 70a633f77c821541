"""The command line as a whole: what it lists, how it fails, and that it answers fast."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chorus.cli import output
from chorus.cli.lazy import LazyCommand
from chorus.cli.main import ENTRIES, app
from chorus.config import describe, load_config
from chorus.core.errors import ChorusError, ConfigError, UnavailableError, UnknownModelError

runner = CliRunner()


def test_the_top_level_teaches_the_first_steps_and_the_exit_codes() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for words in ("First steps", "chorus up -d", "chorus ask", "Exit codes", "130", "CHORUS_HOME"):
        assert words in result.output


def test_without_arguments_it_shows_its_help_as_a_wrong_usage() -> None:
    result = runner.invoke(app, [])
    assert result.exit_code == 2
    assert "First steps" in result.output


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_command_loads_and_has_help(entry: object) -> None:
    result = runner.invoke(app, [entry.name, "--help"])  # type: ignore[attr-defined]
    assert result.exit_code == 0, result.output
    assert "Usage: chorus" in result.output.replace("root", "chorus")
    assert len(LazyCommand(entry).loaded.help or "") > 10  # type: ignore[arg-type]


def test_help_imports_none_of_the_mesh() -> None:
    code = (
        "import sys; from chorus.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'grpc', 'pydantic', 'httpx', 'chorus.config', 'cryptography', 'numpy'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "HEAVY []" in done.stdout


def test_a_mistyped_command_is_a_wrong_usage_with_a_suggestion() -> None:
    result = runner.invoke(app, ["statsu"])
    assert result.exit_code == 2
    assert "status" in result.output


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).output.startswith("chorus ")
    versions = json.loads(runner.invoke(app, ["version", "--json"]).output)
    assert {"chorus", "python", "grpcio"} <= set(versions)


# --- errors ---------------------------------------------------------------------------------------------------------


def run_failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, *, debug: bool = False) -> tuple[int, str]:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("chorus.cli.version._version", broken)
    monkeypatch.setenv(output.DEBUG_ENV, "1" if debug else "")
    result = runner.invoke(app, ["version"])
    if debug and result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("registry.listen = 'x': should be HOST:PORT"), 2),
        (UnknownModelError("no model 'x'"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("boom"), 1),
    ],
)
def test_errors_are_messages_with_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    exit_code, stderr = run_failing(monkeypatch, error)
    assert exit_code == code
    assert "Traceback" not in stderr
    if isinstance(error, ChorusError):
        assert f"error: {error.message}" in stderr
        assert "hint: " in stderr


def test_a_full_disk_is_no_defect_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    exit_code, stderr = run_failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/tmp/answer"))
    assert (exit_code, stderr.strip()) == (1, "error: /tmp/answer: No space left on device")


def test_debugging_lets_the_error_through(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        run_failing(monkeypatch, RuntimeError("boom"), debug=True)


def test_a_message_that_says_what_to_run_gets_no_second_hint() -> None:
    assert output.hint_for(UnknownModelError("no model; run `chorus models pull x`")) == ""


def test_whoever_lost_a_runner_is_told_to_ask_again_and_not_to_start_a_mesh() -> None:
    assert "ask again" in output.hint_for(UnavailableError("the connection to the runner attic broke"))
    assert "chorus doctor" in output.hint_for(UnavailableError("the coordinator is unavailable"))


# --- services and configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["registry", "runner", "coordinator"])
def test_a_service_takes_every_key_of_its_section_as_an_option(service: str) -> None:
    result = runner.invoke(app, [service, "--help"], env={"COLUMNS": "200"})
    for document in describe(service, "mesh", "log"):
        assert document.flag in result.output, document.key
    assert "--engine" not in result.output


def test_every_bad_value_of_a_service_is_told_at_once_by_key_and_origin(tmp_path: Path) -> None:
    file = tmp_path / "chorus.toml"
    file.write_text("[runner]\nslots = 0\n")
    result = runner.invoke(app, ["runner", "--config", str(file), "--name", "Attic", "--labels", "room"])
    assert result.exit_code == 2
    assert f"runner.slots = 0: should be greater than or equal to 1 ({file}:2)" in result.stderr
    assert "runner.name = 'Attic'" in result.stderr
    assert "(flag --labels)" in result.stderr


def test_config_show_is_a_file_that_gives_the_same_configuration(tmp_path: Path) -> None:
    result = runner.invoke(app, ["config", "show"], env={"CHORUS_RUNNER__SLOTS": "9"})
    assert result.exit_code == 0
    assert "slots = 9  # environment variable CHORUS_RUNNER__SLOTS" in result.output
    shown = tmp_path / "shown.toml"
    shown.write_text(result.output)
    assert tomllib.loads(result.output)
    assert load_config(file=shown, environ={}) == load_config(environ={"CHORUS_RUNNER__SLOTS": "9"})


def test_config_as_json() -> None:
    shown = json.loads(
        runner.invoke(app, ["config", "show", "log", "--json"], env={"CHORUS_LOG__LEVEL": "debug"}).output
    )
    assert shown["values"]["log"]["level"] == "debug"
    assert shown["origins"] == {"log.level": "environment variable CHORUS_LOG__LEVEL"}
    documented = json.loads(runner.invoke(app, ["config", "docs", "--json"]).output)
    assert [row["key"] for row in documented] == [document.key for document in describe()]
    assert "| `registry.listen` |" in runner.invoke(app, ["config", "docs", "--markdown"]).output


def test_an_unknown_section_is_a_wrong_usage() -> None:
    assert runner.invoke(app, ["config", "show", "kitchen"]).exit_code == 2
