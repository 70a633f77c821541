"""Clients in other languages stream a generation over mutual TLS, from the protos alone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import PROTOS, Outside
from tests.interop.running import run, run_json_lines

HERE = Path(__file__).parent
PROMPT = "echo: Grüße, สวัสดี 🎶"  # the fake engine answers with what follows, a byte a token

needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (HERE / "node/node_modules/@grpc/grpc-js").is_dir(),
    reason="NODE.JS CLIENT NOT TESTED: run tests/interop/setup.sh, which says what is missing",
)
needs_ruby = pytest.mark.skipif(
    shutil.which("grpc_tools_ruby_protoc") is None
    or subprocess.run(["ruby", "-e", "require 'grpc'"], capture_output=True, check=False).returncode != 0,
    reason="RUBY CLIENT NOT TESTED: run tests/interop/setup.sh, which says what is missing",
)


def check(events: list[dict[str, Any]], kind: str) -> None:
    """A whole stream: the order of its events, gapless indexes, whole characters, and a status that is OK."""
    *stream, last = events
    assert last["status"]["code"] == 0, last
    kinds = [next(name for name in ("started", "delta", "finished", "queued", "progress") if name in e) for e in stream]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    started, finished = stream[0]["started"], stream[-1]["finished"]
    assert started["request_id"] == f"interop-{kind}"
    assert started["runner_id"] == "runner-1"
    deltas = [event["delta"] for event in stream if "delta" in event]
    assert [delta.get("index", 0) for delta in deltas] == list(range(16))
    assert PROMPT.removeprefix("echo:").startswith("".join(delta.get("text", "") for delta in deltas))
    assert finished["usage"]["completion_token_count"] == 16


@needs_node
async def test_node_streams_a_generation(outside: Outside) -> None:
    address, name = outside.coordinator
    script = str(HERE / "node/client.js")
    check(await run_json_lines("node", script, address, name, str(outside.certs), str(PROTOS), PROMPT), "node")


@needs_node
async def test_node_cancels_and_the_slot_is_free_again(outside: Outside) -> None:
    address, name = outside.coordinator
    arguments = (address, name, str(outside.certs), str(PROTOS), PROMPT, "3")
    *_, last = await run_json_lines("node", str(HERE / "node/client.js"), *arguments)
    assert last["status"]["code"] == 1  # CANCELLED
    await outside.mesh.until(
        lambda directory: all(
            load.slots_used == 0 for entry in directory.entries.values() for load in entry.record.load.models
        )
    )


@needs_node
async def test_node_is_told_whom_it_met(outside: Outside) -> None:
    address, _ = outside.coordinator
    wrong = "registry.registry.test.chorus.local"
    *_, last = await run_json_lines(
        "node", str(HERE / "node/client.js"), address, wrong, str(outside.certs), str(PROTOS), PROMPT
    )
    assert last["status"]["code"] == 14  # UNAVAILABLE: the certificate is somebody else's


@needs_ruby
async def test_ruby_streams_a_generation(outside: Outside, tmp_path: Path) -> None:
    address, name = outside.coordinator
    generated = tmp_path / "generated"
    generated.mkdir()
    protos = [str(proto) for proto in PROTOS.rglob("*.proto")]
    code, _, err = await run(
        "grpc_tools_ruby_protoc", "-I", str(PROTOS), f"--ruby_out={generated}", f"--grpc_out={generated}", *protos
    )
    assert code == 0, err
    script = str(HERE / "ruby/client.rb")
    command = ("ruby", "-I", str(generated), script, address, name, str(outside.certs), PROMPT)
    check(await run_json_lines(*command), "ruby")
