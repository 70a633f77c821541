"""tools/setup.py: what a .venv that has to be made anew gets, as where a checkout was moved or copied."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import install

    yield install
    del sys.modules["install"]


def steps(install: Any, checkout: Path, done: dict[str, str], **options: bool) -> set[str]:
    """What is installed into the new .venv of a checkout whose old one, made elsewhere, had been through `done`."""
    asked = install.Options(**{"dev": True, "llama": True, "fresh": False} | options)
    (checkout / "requirements").symlink_to(ROOT / "requirements")
    (checkout / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "chorus-setup.json").write_text(json.dumps({"venv": "of another place", **done}))
    setup = install.Setup(checkout, asked)
    made: list[bool] = []
    setup._make_venv = lambda: made.append(True)
    ran: set[str] = set()
    tasks = setup._tasks

    def noted() -> list[Any]:
        return [
            install.Task(task.name, task.title, task.made_from, lambda _, task=task: ran.add(task.name))
            for task in tasks()
        ]

    setup._tasks = noted
    setup.run()
    assert made
    return ran


LLAMA = {"llama", "model"}


def test_what_was_there_is_there_again_though_less_was_asked_for(install: Any, tmp_path: Path) -> None:
    had = {"packages": "old", "grpcurl": "old", "llama": "old", "model": "old", "test-models": "old"}
    ran = steps(install, tmp_path, had, dev=False, llama=False)
    assert {"packages", "project"} | LLAMA <= ran, "make protos in a copied checkout must not cost it its engine"


def test_nothing_is_added_that_was_neither_there_nor_asked_for(install: Any, tmp_path: Path) -> None:
    base = install._digest(ROOT / "requirements" / "base.txt")
    ran = steps(install, tmp_path, {"packages": base}, dev=False, llama=False)
    assert ran == {"packages", "project"}


def test_a_fresh_one_has_what_was_asked_for_alone(install: Any, tmp_path: Path) -> None:
    ran = steps(install, tmp_path, {"packages": "old", "llama": "old"}, dev=False, llama=False, fresh=True)
    assert ran == {"packages", "project"}
