"""Generating from a tree of protos: what is made, what is removed, and what `--check` says."""

from pathlib import PurePosixPath

import pytest

from protos import differences, generate, write

PACKAGE = PurePosixPath("chorus/api")
MESSAGE = """syntax = "proto3";
package chorus.api.probe.v1;
// A question.
message Ask { string text = 1; }
"""
SERVICE = """
// Asks.
service Probe { rpc Try(Ask) returns (Ask); }
"""


@pytest.fixture
def protos(tmp_path):
    directory = tmp_path / "protos" / "chorus" / "api" / "probe" / "v1"
    directory.mkdir(parents=True)
    (directory / "ask.proto").write_text(MESSAGE)
    return tmp_path / "protos"


def _ask(protos):
    return protos / "chorus" / "api" / "probe" / "v1" / "ask.proto"


def test_only_a_proto_with_a_service_gets_grpc_files(protos):
    made = {str(path) for path in generate(protos, PACKAGE)}
    packages = {f"chorus/api/{directory}__init__.py" for directory in ("", "probe/", "probe/v1/")}
    messages = {f"chorus/api/probe/v1/ask_pb2.{ending}" for ending in ("py", "pyi")}
    assert made == packages | messages
    _ask(protos).write_text(MESSAGE + SERVICE)
    grpc = {f"chorus/api/probe/v1/ask_pb2_grpc.{ending}" for ending in ("py", "pyi")}
    assert {str(path) for path in generate(protos, PACKAGE)} == packages | messages | grpc


def test_writing_removes_what_no_proto_makes_any_more_and_touches_nothing_else(protos, tmp_path):
    out = tmp_path / "services"
    neighbour = out / "chorus" / "core" / "mine.py"
    neighbour.parent.mkdir(parents=True)
    neighbour.write_text("kept")
    made = generate(protos, PACKAGE)
    assert write(made, out, PACKAGE) == (len(made), 0)
    assert differences(made, out, PACKAGE) == []
    assert write(made, out, PACKAGE) == (0, 0)

    stale = out / "chorus" / "api" / "gone" / "v1" / "gone_pb2.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    (out / "chorus" / "api" / "probe" / "v1" / "ask_pb2.py").write_text("edited by hand")
    (out / "chorus" / "api" / "__init__.py").unlink()
    told = "\n".join(differences(made, out, PACKAGE))
    assert "not generated from any proto: chorus/api/gone/v1/gone_pb2.py" in told
    assert "missing: chorus/api/__init__.py" in told
    assert "-edited by hand" in told

    assert write(made, out, PACKAGE) == (2, 1)
    assert not (out / "chorus" / "api" / "gone").exists()
    assert differences(made, out, PACKAGE) == []
    assert neighbour.read_text() == "kept"


def test_a_proto_outside_the_package_is_refused(protos):
    (protos / "stray.proto").write_text('syntax = "proto3";\nmessage Stray {}\n')
    with pytest.raises(SystemExit, match="a proto's directory must be its package"):
        generate(protos, PACKAGE)
