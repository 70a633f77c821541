"""What the tests of models share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chorus.models.store import ModelStore
from tests.models.file_server import FileServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A file server on loopback, reached through no proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FileServer().running() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """An empty models folder with a state folder of its own."""
    return ModelStore.open(tmp_path / "models", state_dir=tmp_path / "state")
