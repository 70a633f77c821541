"""The doctor's checks: each trouble is told with what to do about it."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from chorus.config import load_config
from chorus.core.findings import Level
from chorus.core.identity import Role
from chorus.local.certificates import ensure_authority, ensure_leaves
from chorus.local.doctor import machine
from chorus.local.doctor.machine import LlamaBuild, ask_llama, check_clock, check_llama, check_memory, check_models
from chorus.local.doctor.mesh import check_certificates, check_local
from chorus.local.home import MeshHome
from chorus.local.state import MeshState, ProcessRef, ProcessState, this_process

NOW = datetime.now(UTC)
LOCAL = MeshState(this_process(), "ready", True, "", "", "", "")


def test_a_clock_that_was_never_set() -> None:
    (finding,) = check_clock(datetime(1970, 1, 1, 0, 5, tzinfo=UTC))
    assert (finding.level, bool(finding.advice)) == (Level.FAIL, True)
    assert next(check_clock(NOW)).level is Level.OK


def test_the_installed_llama_cpp_is_described() -> None:
    build = ask_llama()
    assert (build.problem, "cpu" in build.backends) == ("", True)


@pytest.mark.parametrize(("ollama_here", "level"), [(False, Level.FAIL), (True, Level.WARN)])
def test_no_llama_cpp_matters_less_where_an_ollama_is(ollama_here: bool, level: Level) -> None:
    (finding,) = check_llama(LlamaBuild(problem="it is not installed"), ollama_here)
    assert (finding.level, bool(finding.advice)) == (level, True)


def test_certificates_are_looked_at_one_by_one(tmp_path: Path) -> None:
    assert next(check_certificates(tmp_path / "none", NOW)).level is Level.OK
    authority = ensure_authority(tmp_path, trust_domain=None)
    ensure_leaves(tmp_path, authority, {(Role.CLIENT, "cli"): (), (Role.RUNNER, "attic"): ()})
    (good,) = check_certificates(tmp_path, NOW)
    assert (good.level, "3 in" in good.message) == (Level.OK, True)
    late = list(check_certificates(tmp_path, NOW + timedelta(days=200)))
    assert [(finding.level, "client-cli" in finding.message) for finding in late] == [(Level.FAIL, True)]
    early = list(check_certificates(tmp_path, NOW - timedelta(days=1)))
    assert len(early) == 3
    assert all("set the clock" in finding.advice for finding in early)
    (tmp_path / "runner-attic" / "tls.key").chmod(0o644)
    assert any("runner-attic" in finding.message for finding in check_certificates(tmp_path, NOW))


GIANT = """
[[families]]
name = "giant"
description = "Larger than any machine that runs tests."
license = "MIT"
license_url = "https://example.org"
parameter_count = 4_000_000_000_000
context_length = 4096
tier = "large"
tags = ["chat"]
[[families.artifacts]]
file = "giant.Q8_0.gguf"
quantization = "Q8_0"
size_bytes = 4_000_000_000_000
sources = ["https://example.org/giant.Q8_0.gguf"]
evidence = "agreed"
"""


@pytest.mark.parametrize(
    ("model", "level", "words"),
    [
        ("smollm2-135m-instruct", Level.OK, "need about"),
        ("a-model-of-my-own", Level.OK, "not in the catalog"),
        ("giant", Level.FAIL, "need about"),
    ],
)
def test_a_model_larger_than_the_machine_is_said_so(tmp_path: Path, model: str, level: Level, words: str) -> None:
    (tmp_path / "mine.toml").write_text(GIANT)
    flags = {"runner.models": [model], "runner.catalogs": [str(tmp_path / "mine.toml")]}
    (finding,) = check_memory(load_config(flags=flags, environ={}))
    assert (finding.level, words in finding.message) == (level, True)


def test_a_broken_file_among_the_models_is_named(tmp_path: Path) -> None:
    (tmp_path / "half.gguf").write_bytes(b"GGUF, or the beginning of one")
    findings = list(check_models(load_config(flags={"runner.models_dir": str(tmp_path)}, environ={})))
    assert findings[0].level is Level.FAIL
    assert "half.gguf" in findings[0].message


@pytest.mark.parametrize(
    ("state", "level", "words"),
    [
        (LOCAL, Level.OK, "ready"),
        (replace(LOCAL, supervisor=ProcessRef(this_process().pid, 0.0)), Level.WARN, "supervisor was killed"),
        (
            replace(
                LOCAL,
                processes=(ProcessState("runner-2", "runner", "", "down", "", "", last_end="exited with code 1"),),
            ),
            Level.FAIL,
            "runner-2 exited with code 1",
        ),
    ],
)
def test_what_runs_here(tmp_path: Path, state: MeshState, level: Level, words: str) -> None:
    home = MeshHome(tmp_path, chosen=True)
    state.write(home.state_file)
    (finding,) = check_local(home)
    assert (finding.level, words in finding.message) == (level, True)


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[http.server.BaseHTTPRequestHandler]]:
    """An HTTP server where Ollama would be; its class's `body` is what it answers."""

    class Answering(http.server.BaseHTTPRequestHandler):
        body = b'{"version": "0.30.1"}'

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.body)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(machine, "OLLAMA", f"http://127.0.0.1:{server.server_port}/api/version")
        yield Answering
        server.shutdown()
        thread.join()


def test_an_ollama_is_found(ollama: type[http.server.BaseHTTPRequestHandler]) -> None:
    assert machine.find_ollama() == "0.30.1"


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}"])
def test_something_else_on_its_port_is_no_ollama(
    ollama: type[http.server.BaseHTTPRequestHandler], monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(ollama, "body", body)
    assert machine.find_ollama() is None
