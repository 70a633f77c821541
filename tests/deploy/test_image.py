"""The Containerfile agrees with the manifests and the locks. (It was not built: there was no base to build it on.)"""

from __future__ import annotations

import re
from pathlib import Path

from tests.deploy.manifests import overlay, pod_template

ROOT = Path(__file__).resolve().parents[2]
CONTAINERFILE = (ROOT / "deploy" / "image" / "Containerfile").read_text("utf-8")


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of that name."""
    joined = re.sub(r"\\\n\s*", "", CONTAINERFILE)
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


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


def test_it_is_not_built_for_the_processor_that_builds_it():
    assert "-DGGML_NATIVE=off" in instructions("ARG")[-1]
    assert "GGML_NATIVE=on" not in CONTAINERFILE
