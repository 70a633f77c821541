"""What is shipped: the same sources give the same wheel, and the bill of materials tells what the locks do."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from sbom import bill, pins

ROOT = Path(__file__).resolve().parents[2]


def built(folder: Path, mtime: int, umask: int) -> Path:
    """The wheel of this checkout's files, copied elsewhere, touched at another time, written under another umask."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    tree = folder / "tree"
    before = os.umask(umask)
    try:
        for name in listed.rstrip("\0").split("\0"):
            if name.startswith(("tests/", "benchmarks/", "docs/")) or not os.path.lexists(ROOT / name):
                continue
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name, follow_symlinks=False)
            os.utime(tree / name, (mtime, mtime), follow_symlinks=False)
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
        environ = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
        subprocess.run(command, cwd=tree, env=environ, check=True, capture_output=True)
    finally:
        os.umask(before)
    [wheel] = (folder / "dist").glob("*.whl")
    return wheel


def test_the_same_sources_give_the_same_wheel_wherever_and_whenever_it_is_built(tmp_path):
    (tmp_path / "other place").mkdir()
    one = built(tmp_path, 1_600_000_000, 0o022)
    two = built(tmp_path / "other place", 1_650_000_000, 0o077)
    assert one.name == two.name
    assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(two.read_bytes()).digest()
    names = set(zipfile.ZipFile(one).namelist())
    assert {"chorus/cli/main.py", "chorus/k8s/manifests/base/kustomization.yaml", "chorus/py.typed"} <= names


def test_the_bill_of_materials_names_every_package_of_the_locks_with_its_sums():
    locks = [(ROOT / "requirements" / f"{name}.txt").read_text("utf-8") for name in ("base", "llama")]
    found = [pin for lock in locks for pin in pins(lock)]
    text = bill(found, name="chorus", version="1.2.3")
    assert text == bill(reversed(found), name="chorus", version="1.2.3")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    told = json.loads(text)
    assert told["metadata"]["component"]["version"] == "1.2.3"
    for lock in locks:
        for name, version in re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^\s;]+)", lock, flags=re.MULTILINE):
            [component] = [one for one in told["components"] if (one["name"], one["version"]) == (name, version)]
            assert component["purl"] == f"pkg:pypi/{name}@{version}"
            sums = {one["value"] for one in component["properties"] if one["name"] == "chorus:sha256"}
            assert sums
            assert all(f"sha256:{digest}" in lock for digest in sums) or lock is not locks[0]


def test_a_package_without_a_sum_is_refused():
    with pytest.raises(ValueError, match="grpcio has no hash"):
        list(pins("grpcio==1.85.1\n"))
