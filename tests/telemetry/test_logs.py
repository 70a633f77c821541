"""Logs: what a line holds, what it must not hold, and that nothing that is logged can break it."""

from __future__ import annotations

import io
import json
import logging
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import ConfigError, UnavailableError
from chorus.telemetry import context
from chorus.telemetry.logs import Format, Level, _FromStdlib, configure_logging, get_logger
from chorus.telemetry.redaction import SECRET_FIELDS, TEXT_FIELDS, redact, without_keys

log = get_logger(module="tests")


class Captured(io.StringIO):
    """A stream that reads back as the events written to it."""

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]

    def only(self) -> dict[str, Any]:
        (event,) = self.events()
        return event


@pytest.fixture
def out() -> Iterator[Captured]:
    stream = Captured()
    with configure_logging(service="runner", format="json", stream=stream):
        yield stream


def test_a_line_says_when_how_severe_who_and_what(out: Captured) -> None:
    log.warning("lease.expired", runner="attic", age_s=2.5)
    event = out.only()
    assert list(event) == ["timestamp", "level", "service", "event", "module", "runner", "age_s"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", event["timestamp"])
    assert (event["level"], event["service"], event["event"]) == ("warning", "runner", "lease.expired")


def test_a_line_belongs_to_its_request(out: Captured) -> None:
    with context.bound(context.new_context("req-1")) as hop:
        log.info("call.started")
        logging.getLogger("grpc.aio").warning("from a library")
    log.info("outside")
    inside, library, outside = out.events()
    for event in (inside, library):
        assert (event["request_id"], event["trace_id"], event["span_id"]) == ("req-1", hop.trace_id, hop.span_id)
    assert "request_id" not in outside


@pytest.mark.parametrize(("level", "logged"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_levels_hold_for_us_and_for_libraries(level: Level, logged: int) -> None:
    stream = Captured()
    with configure_logging(service="s", level=level, format="json", stream=stream):
        for name in ("debug", "info", "warning", "error"):
            getattr(log, name)("an.event")
            getattr(logging.getLogger("grpc"), name)("text")
    assert len(stream.events()) == 2 * logged


def test_what_libraries_say_of_every_request_is_left_out(out: Captured) -> None:
    logging.getLogger("httpx").info("HTTP Request: GET https://hub/")
    logging.getLogger("httpx").warning("retrying %s", "https://hub/?token=abcdef")
    event = out.only()
    assert (event["event"], event["library"]) == ("library.log", "httpx")
    assert event["message"] == "retrying https://hub/?token=<redacted>"


def test_a_library_with_a_broken_format_or_a_level_of_its_own_is_logged(out: Captured) -> None:
    # Handed over directly: pytest's own handler fails on a broken format.
    (bridge,) = (handler for handler in logging.getLogger().handlers if isinstance(handler, _FromStdlib))
    bridge.handle(logging.LogRecord("grpc", logging.ERROR, __file__, 1, "%d", ("not a number",), None))
    bridge.handle(logging.LogRecord("grpc", 35, __file__, 1, "between", (), None))
    assert [(event["level"], event["message"]) for event in out.events()] == [("error", "%d"), ("warning", "between")]


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize("field", [*sorted(TEXT_FIELDS | SECRET_FIELDS), "system_prompt", "Hub-Token", "X_API_KEY"])
def test_texts_and_keys_become_lengths(format: Format, field: str) -> None:
    stream = io.StringIO()
    with configure_logging(service="s", format=format, stream=stream):
        log.info("an.event", **{field: "hunter2"})
        log.info("an.event", request={"deep": [{field: "hunter2"}]})
    assert "hunter2" not in stream.getvalue()
    assert stream.getvalue().count("<7 characters>") == 2


@pytest.mark.parametrize("field", sorted(TEXT_FIELDS | SECRET_FIELDS))
def test_prompts_are_shown_where_asked_for_and_keys_never(field: str) -> None:
    stream = io.StringIO()
    with configure_logging(service="s", format="json", stream=stream, prompts=True):
        log.info("an.event", **{field: "hunter2"})
    assert ("hunter2" in stream.getvalue()) == (field not in SECRET_FIELDS)


def test_counts_of_tokens_are_no_texts(out: Captured) -> None:
    log.info("an.event", prompt_tokens=3, tokens=4, text_length=5, authorization=None)
    event = out.only()
    assert (event["prompt_tokens"], event["tokens"], event["text_length"], event["authorization"]) == (3, 4, 5, None)


def test_a_whole_object_is_logged_as_its_type(out: Captured) -> None:
    class Request:
        def __str__(self) -> str:
            return "hunter2"

        __repr__ = __str__

    log.info("an.event", request=Request(), many=[Request()], raw=b"hunter2", path=Path("a/b"))
    event = out.only()
    assert (event["request"], event["many"], event["raw"]) == ("<Request>", ["<Request>"], "<bytes>")
    assert event["path"] == str(Path("a/b"))


def test_an_exception_is_fields_without_locals_or_keys(out: Captured) -> None:
    api_key = "hunter2"
    try:
        raise UnavailableError(f"refused with Bearer abcdefghij by {len(api_key)}")
    except UnavailableError:
        log.exception("call.failed")
    event = out.only()
    assert (event["level"], event["reason"]) == ("error", "UNAVAILABLE")
    (shown,) = event["exception"]
    assert (shown["exc_type"], shown["exc_value"]) == ("UnavailableError", "refused with <redacted> by 7")
    assert shown["frames"][-1]["name"] == "test_an_exception_is_fields_without_locals_or_keys"
    assert "hunter2" not in out.getvalue()


def test_an_exception_of_a_library_is_fields_too(out: Captured) -> None:
    try:
        int("x")
    except ValueError:
        logging.getLogger("asyncio").exception("Task exception was never retrieved")
    event = out.only()
    assert event["exception"][0]["exc_type"] == "ValueError"


def test_people_read_a_traceback_and_no_escape_sequences() -> None:
    stream = io.StringIO()
    with configure_logging(service="s", format="console", stream=stream):
        try:
            raise ValueError("\x1b[31mred")
        except ValueError:
            log.exception("call.failed", peer="\x1b[2J", name="two\nlines")
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "Traceback (most recent call last):\n" in text
    assert "two\\nlines" in text


def test_auto_is_json_unless_somebody_watches() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    piped, terminal = io.StringIO(), Terminal()
    for stream in (piped, terminal):
        with configure_logging(service="s", stream=stream):
            log.info("an.event")
    assert json.loads(piped.getvalue())["event"] == "an.event"
    assert not terminal.getvalue().startswith("{")


def test_without_a_stream_events_go_to_what_standard_error_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    with configure_logging(service="s", format="json"):
        log.info("an.event")
    assert json.loads(capsys.readouterr().err)["event"] == "an.event"


def test_a_file_is_private_and_appended_to(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "runner.log"
    for _ in range(2):
        with configure_logging(service="s", format="json", file=file):
            log.info("an.event", name="größe")
    assert [json.loads(line)["name"] for line in file.read_text("utf-8").splitlines()] == ["größe"] * 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_file_that_cannot_be_written_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "blocked").touch()
    with pytest.raises(ConfigError, match=r"log\.file = .*cannot be written"):
        configure_logging(service="s", file=tmp_path / "blocked" / "x.log")


def test_closing_restores_what_was_there() -> None:
    root, httpx = logging.getLogger(), logging.getLogger("httpx")
    before = (list(root.handlers), root.level, httpx.level)
    stream = Captured()
    handle = configure_logging(service="s", level="debug", format="json", stream=stream)
    bound = log.bind()
    handle.close()
    handle.close()
    assert (list(root.handlers), root.level, httpx.level) == before
    stream.close()
    bound.info("goes.to.standard.error")


def test_a_stream_that_is_gone_costs_the_line_alone() -> None:
    stream = io.StringIO()
    with configure_logging(service="s", format="json", stream=stream):
        stream.close()
        log.info("an.event")


def test_a_stream_of_few_characters_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with configure_logging(service="s", format="json", stream=stream):
        log.info("an.event", name="ß \ud800")
    assert json.loads(raw.getvalue())["name"] == "ß \ud800"


def test_lines_of_many_threads_stay_whole(out: Captured) -> None:
    threads = [
        threading.Thread(target=lambda: [log.info("an.event", filler="x" * 500) for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(out.events()) == 200


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(object()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
    max_leaves=8,
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), values, max_size=4))
def test_whatever_is_logged_gives_one_line_of_json(fields: dict[str, Any]) -> None:
    names = {"event", "level", "exc_info", "exc", "service", "timestamp", "message", "exception", "reason", "self"}
    stream = Captured()
    with configure_logging(service="s", format="json", stream=stream):
        log.info("an.event", **{name: value for name, value in fields.items() if name not in names})
    assert stream.only()["event"] == "an.event"


def test_a_value_without_end_is_cut() -> None:
    loop: list[object] = []
    loop.append(loop)
    event: dict[str, object] = {"loop": loop, "long": "x" * 100_000}
    redact(event, prompts=True)
    assert len(str(event)) < 10_000


@pytest.mark.parametrize(
    "key",
    [
        "Authorization: Bearer abc.def-ghi",
        "basic dXNlcjpwYXNz",
        "hf_abcdefghijklmnop",
        "sk-proj-abcdefghijkl",
        "https://user:hunter2@host/path",
        "?api_key=abcdef&x=1",
        # In two pieces, so that nobody takes this file for one that holds a key.
        "-----BEGIN EC " + "PRIVATE KEY-----\nMHcCAQ\n-----END EC " + "PRIVATE KEY-----",
    ],
)
def test_what_looks_like_a_key_is_taken_out_of_free_text(key: str) -> None:
    shown = without_keys(f"before {key} after")
    assert isinstance(shown, str)
    assert "<redacted>" in shown
    assert shown.endswith(" after")
    for secret in ("abc", "dXNl", "hunter2", "MHcCAQ"):
        assert secret not in shown


def test_who_configures_nothing_hears_warnings_alone_and_not_on_standard_output() -> None:
    """As in `chorus ask`, or in a program that imports `chorus.client`."""
    program = (
        "from chorus.telemetry.logs import get_logger\n"
        "log = get_logger(module='tests')\n"
        "log.debug('a.detail')\n"
        "log.info('a.fact')\n"
        "log.bind(more=1).warning('a.warning')\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert "a.warning" in line
    assert "more=1" in line
