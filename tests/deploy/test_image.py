"""The Containerfile agrees with the manifests and the locks. It is built, and tried, by hand: docs/k3s.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.deploy.manifests import overlay, pod_template

ROOT = Path(__file__).resolve().parents[2]
CONTAINERFILE = (ROOT / "deploy" / "image" / "Containerfile").read_text("utf-8")


JOINED = re.sub(r"\\\n\s*", "", CONTAINERFILE)


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of that name."""
    return re.findall(rf"^{name} (.*)$", JOINED, re.MULTILINE)


def test_it_runs_as_the_user_that_the_manifests_name():
    (user,) = instructions("USER")
    for document in overlay("home"):
        if (template := pod_template(document)) is not None:
            context = template["spec"]["securityContext"]
            assert user == f"{context['runAsUser']}:{context['runAsGroup']}"


def test_its_entry_point_is_what_the_manifests_give_arguments_to():
    assert instructions("ENTRYPOINT") == ['["chorus"]']
    assert CONTAINERFILE.rstrip().endswith('ENTRYPOINT ["chorus"]')


def test_whatever_is_installed_is_locked_by_its_hash():
    files = set(re.findall(r"requirements/\w+\.txt", CONTAINERFILE))
    assert files == {f"requirements/{name}.txt" for name in ("base", "build", "llama")}
    assert all((ROOT / name).exists() for name in files)
    assert "PIP_REQUIRE_HASHES=1" in CONTAINERFILE
    for line in instructions("RUN"):
        for step in line.split("&&"):
            if "PIP_REQUIRE_HASHES=0" in step:  # wheels that were made here, of what was locked
                assert "--no-index" in step


def built_with(**arguments: str) -> dict[str, str]:
    """The build arguments and variables of a build with these `--build-arg`s, as far as instructions say them."""
    known: dict[str, str] = {}
    for name, text in re.findall(r"^(ARG|ENV) (.*)$", JOINED, re.MULTILINE):
        for pair in shlex.split(text):
            key, _, default = pair.partition("=")
            value = arguments.get(key, default) if name == "ARG" else default
            known[key] = re.sub(r"\$\{(\w+)\}", lambda found: known[found[1]], value)
    return known


def test_it_is_not_built_for_the_processor_that_builds_it():
    assert "-DGGML_NATIVE=off" in built_with()["CMAKE_ARGS"].split()
    assert "GGML_NATIVE=on" not in CONTAINERFILE


def test_one_base_does_for_building_and_running():
    made = built_with(BASE="localhost/debian:trixie-slim")
    assert made["BUILD_BASE"] == made["RUN_BASE"] == "localhost/debian:trixie-slim"
    assert re.findall(r"^FROM (\S+)", JOINED, re.MULTILINE) == ["${BUILD_BASE}", "${RUN_BASE}"]


def test_the_arguments_for_cuda_that_its_head_tells_are_those_that_there_are():
    head = CONTAINERFILE.partition("\nARG ")[0]
    told = dict(re.findall(r'--build-arg (\w+)="?([^"\s]+)', head))
    assert {"BUILD_BASE", "RUN_BASE", "GGML", "BASE"} == told.keys()
    made = built_with(**{key: value for key, value in told.items() if key != "BASE"})
    assert (made["BUILD_BASE"], made["RUN_BASE"]) == (told["BUILD_BASE"], told["RUN_BASE"])
    flags = made["CMAKE_ARGS"].split()
    assert flags[-1] == "-DGGML_CUDA=on"  # the last word on an option is cmake's
    assert "-DGGML_NATIVE=off" in flags
    # What is built with one toolkit runs on its libraries.
    assert told["BUILD_BASE"].replace("-devel-", "-runtime-") == told["RUN_BASE"]


def test_the_script_that_makes_a_base_makes_the_one_that_is_told():
    script = (ROOT / "deploy" / "image" / "base.sh").read_text("utf-8")
    assert "suite=${1:-trixie}" in script
    assert '"localhost/debian:$suite-slim"' in script
    assert "BASE=localhost/debian:trixie-slim" in CONTAINERFILE
    assert built_with()["BASE"] == "docker.io/library/debian:trixie-slim"
