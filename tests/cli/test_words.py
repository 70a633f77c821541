"""What commands make of words: questions out of arguments and pipes, slash commands, events, summaries."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from chorus.cli import ask, rerank, up_view
from chorus.cli.answering import Answer
from chorus.cli.chat import Chat
from chorus.cli.main import app
from chorus.cli.output import console
from chorus.cli.up_view import UpView, summary
from chorus.client import AttemptChanged, Origin, RerankAnswer, StartedAt
from chorus.core.generation import (
    ChoiceOutcome,
    Finished,
    FinishReason,
    Ranked,
    Started,
    Timings,
    TokenDelta,
    Usage,
)
from chorus.core.resilience.restarts import LeaveDown, StartAgain
from chorus.local import events
from chorus.local.home import MeshHome
from chorus.local.lan import LanAddress
from chorus.local.state import MeshState, ProcessState, this_process

PROCESSES = tuple(
    ProcessState(name, role, f"192.168.7.20:{port}", "healthy", "", "", this_process())
    for name, role, port in (("registry", "registry", 7101), ("attic-1", "runner", 7201))
)
STATE = MeshState(
    this_process(),
    "ready",
    True,
    "chorus.local",
    "/certs",
    "coordinator@192.168.7.20:7301",
    "client-cli",
    processes=PROCESSES,
)


class Piped(io.TextIOWrapper):
    """Standard input that is a pipe, or seems to be a terminal."""

    def __init__(self, text: str, *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(text.encode()))
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("words", "piped", "question"),
    [
        (["Why", "is", "it", "blue?"], "ignored", "Why is it blue?"),
        ([], "from a pipe\n", "from a pipe"),
        (["-"], "from a pipe\n", "from a pipe"),
        (["Summarise", "this:", "-"], "some\ntext\n", "Summarise this:\n\nsome\ntext"),
        (["Given", "-", "what", "follows?"], "x", "Given\n\nx\n\nwhat follows?"),
        (["a - b"], "ignored", "a - b"),
    ],
)
def test_a_question_is_words_or_a_pipe_or_both(
    monkeypatch: pytest.MonkeyPatch, words: list[str], piped: str, question: str
) -> None:
    monkeypatch.setattr("sys.stdin", Piped(piped))
    assert ask._question(words) == question


@pytest.mark.parametrize(("words", "terminal"), [([], True), (["-", "-"], False), (["  "], True), ([], False)])
def test_no_question_is_a_wrong_usage(monkeypatch: pytest.MonkeyPatch, words: list[str], terminal: bool) -> None:
    monkeypatch.setattr("sys.stdin", Piped("", terminal=terminal))
    with pytest.raises(typer.BadParameter):
        ask._question(words)


def test_documents_are_words_or_the_lines_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Piped("one\n\n two \n"))
    assert rerank._documents(["a b", "c"]) == ["a b", "c"]
    assert rerank._documents([]) == ["one", " two "]
    for empty in (Piped(""), Piped("", terminal=True)):
        monkeypatch.setattr("sys.stdin", empty)
        with pytest.raises(typer.BadParameter, match="chorus rerank"):
            rerank._documents([])


def test_a_ranking_is_told_with_its_documents() -> None:
    answer = RerankAnswer((Ranked(1, 2.5, truncated=True), Ranked(0, -1.0)), 9, "m", "", "node", "r1")
    told = rerank.to_json(answer, ["a", "b"])["documents"]
    assert isinstance(told, list)
    assert told[0] == {"index": 1, "score": 2.5, "truncated": True, "text": "b"}
    assert next(iter(rerank._table(answer, ["a", "b"]).columns))._cells == ["2.500", "-1.000"]


def test_an_answer_tells_who_took_over_last() -> None:
    answer = Answer()
    for event in (
        StartedAt(Started("m", "m.Q8_0", "ab" * 32, 7, 0, 1, 4096), Origin("request", "attic", "runner-1", 1)),
        TokenDelta(0, 0, (5,), "Hel"),
        AttemptChanged(2, "cellar", "runner-2", "UNAVAILABLE", 0.1, False),
        TokenDelta(0, 1, (6,), "lo"),
        Finished((ChoiceOutcome(0, FinishReason.END, 2),), Usage(7, 0, 2), Timings(tokens_per_second=50.0)),
    ):
        answer.take(event)
    told = answer.to_json()
    assert (told["text"], told["runner_id"], told["node_id"], told["attempts"]) == ("Hello", "runner-2", "cellar", 2)
    assert (told["finish_reason"], told["artifact_sha256"], told["request_id"]) == ("end", "ab" * 32, "request")
    assert json.loads(json.dumps(told)) == told
    assert answer.stats().startswith("cellar/runner-2  m.Q8_0  7 in, 2 out")


def test_an_unanswered_question_is_taken_back() -> None:
    chat = Chat(instructions="Be brief.")
    chat.ask("hello")
    chat.answered("")
    assert chat.turns == []
    chat.ask("hello")
    chat.answered("Hi.")
    assert chat.to_markdown() == "**instructions**\n\nBe brief.\n\n**user**\n\nhello\n\n**assistant**\n\nHi.\n"


def test_each_end_of_a_process_is_told_with_what_happens_next(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    view = UpView(MeshHome(tmp_path), as_json=False)
    ended = events.Ended("runner-2", "was killed by SIGKILL", StartAgain(1.0, 1), "/logs/runner-2.log", ("last words",))
    view.see(ended)
    view.see(replace(ended, decision=LeaveDown(3)))
    told = capsys.readouterr().err
    assert "runner-2 was killed by SIGKILL; starting it again (failure 1 in a row)" in told
    assert "after 3 failures in a row it is left down" in told
    assert "last words" in told
    assert "/logs/runner-2.log" in told


def test_every_event_is_a_line_for_programs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    view = UpView(MeshHome(tmp_path), as_json=True)
    for event in (
        events.Started("registry", 7, again=False),
        events.Serving("registry"),
        events.Ended("registry", "exited with code 1", LeaveDown(3), "/log", ()),
        events.Ready(STATE),
        events.Stopping("registry", 0.0),
        events.Stopped("registry", politely=True),
    ):
        view.see(event)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["started", "serving", "ended", "ready", "stopping", "stopped"]
    assert (lines[2]["decision"], lines[2]["failures"]) == ("leave_down", 3)
    assert lines[3]["processes"][0]["address"] == "192.168.7.20:7101"


def test_a_mesh_for_a_household_says_what_to_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(up_view, "private_addresses", lambda: [LanAddress("eth0", "192.168.7.20", "192.168.7.0/24")])
    with console().capture() as captured:
        console().print(summary(STATE, MeshHome(tmp_path, chosen=True)))
    told = captured.get()
    assert "open these TCP ports of 192.168.7.20: 7101 (registry), 7201 (attic-1)" in told
    assert "ufw allow from 192.168.7.0/24 to 192.168.7.20 port 7101,7201 proto tcp" in told
    assert f"chorus token create --role runner --dir {tmp_path}" in told
    assert f"chorus ask --dir {tmp_path}" in told


@pytest.mark.parametrize("seconds", ["inf", "1e9", "0", "nan", "soon"])
def test_a_timeout_that_can_not_be_is_told_by_its_flag(seconds: str) -> None:
    refused = CliRunner().invoke(app, ["ask", "hello", "--timeout", seconds])
    assert refused.exit_code != 0
    assert "--timeout" in refused.output
    assert "timeout_s" not in refused.output
