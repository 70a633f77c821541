"""The models folder: what is found in it, what is not believed, and what goes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from chorus.core.errors import ConfigError, InvalidRequestError, ModelFileError, NotFoundError, UnknownModelError
from chorus.models import digest
from chorus.models.pull import PullOptions, pull_artifact
from chorus.models.sources.offer import ImportMode
from chorus.models.store import ModelStore
from tests.models.tiny import write_model


def put(store: ModelStore, tmp_path: Path, file: str, **how: object) -> Path:
    """Pulls a small model into the folder."""
    source = write_model(tmp_path / "sources" / file, **how)  # type: ignore[arg-type]
    return pull_artifact(str(source), store, options=PullOptions(mode=ImportMode.COPY)).path


def test_a_folder_that_is_not_there_yet_is_empty(store: ModelStore) -> None:
    assert store.artifacts() == []
    assert not store.directory.exists()
    with pytest.raises(UnknownModelError, match="none yet"):
        store.find("anything")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(ConfigError, match="should be a folder"):
        ModelStore.open(tmp_path / "models")


def test_models_are_listed_with_all_that_is_known(store: ModelStore, tmp_path: Path) -> None:
    path = put(store, tmp_path, "Tiny-Test.Q8_0.gguf")
    (stored,) = store.artifacts()
    assert stored.path == stored.place == path == store.directory / "tiny-test" / "Tiny-Test.Q8_0.gguf"
    assert stored.artifact.name == "Tiny-Test.Q8_0"
    assert stored.artifact.family == "tiny-test"
    assert stored.artifact.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert stored.artifact.size_bytes == path.stat().st_size
    assert stored.artifact.license == "mit"
    assert stored.source.endswith("sources/Tiny-Test.Q8_0.gguf")
    assert not stored.referenced
    assert stored.info.context_length == 2048


def test_files_put_there_by_hand_are_found(store: ModelStore, tmp_path: Path) -> None:
    write_model(store.directory / "By-Hand-Q4_0.gguf")
    write_model(store.directory / "folder" / "Deeper.GGUF")
    write_model(store.directory / "too" / "deep" / "m.gguf")
    write_model(store.directory / ".hidden" / "m.gguf")
    (store.directory / "notes.txt").write_text("nothing")
    listing = store.scan()
    assert [stored.artifact.name for stored in listing.artifacts] == ["By-Hand-Q4_0", "Deeper"]
    assert [stored.artifact.family for stored in listing.artifacts] == ["by-hand", "deeper"]
    assert listing.broken == ()


def test_digests_of_files_put_there_by_hand_are_computed_once(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(store.directory / "m.gguf")
    (first,) = store.artifacts()
    monkeypatch.setattr(digest, "sha256_of", lambda *_: pytest.fail("it was read again"))
    again = ModelStore.open(store.directory, state_dir=tmp_path / "state")
    assert [stored.artifact.sha256 for stored in again.artifacts()] == [first.artifact.sha256]


def test_pulled_files_are_not_read_again(store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, tmp_path, "m.gguf")
    monkeypatch.setattr(digest, "sha256_of", lambda *_: pytest.fail("it was read again"))
    assert len(ModelStore.open(store.directory, state_dir=tmp_path / "other state").artifacts()) == 1


def test_broken_files_are_told_apart_and_do_not_hide_the_sound(store: ModelStore, tmp_path: Path) -> None:
    put(store, tmp_path, "Sound.gguf")
    (store.directory / "page.gguf").write_text("<!DOCTYPE html>")
    truncated = write_model(store.directory / "truncated.gguf")
    os.truncate(truncated, truncated.stat().st_size - 100)
    write_model(store.directory / "adapter.gguf", kind="adapter")
    listing = store.scan()
    assert [stored.artifact.name for stored in listing.artifacts] == ["Sound"]
    problems = {broken.place.name: broken.problem for broken in listing.broken}
    assert "not a GGUF" in problems["page.gguf"]
    assert "truncated" in problems["truncated.gguf"]
    assert "adapters of type 'none'" in problems["adapter.gguf"]


def test_a_file_that_was_altered_after_its_pull_is_not_believed(store: ModelStore, tmp_path: Path) -> None:
    path = put(store, tmp_path, "m.gguf")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    listing = store.scan()
    assert listing.artifacts == ()
    assert "SHA-256" in listing.broken[0].problem


def test_a_folder_that_was_copied_is_as_good(store: ModelStore, tmp_path: Path) -> None:
    path = put(store, tmp_path, "m.gguf")
    shutil.copytree(store.directory, tmp_path / "copy", copy_function=shutil.copy)  # new times
    os.utime(tmp_path / "copy" / path.relative_to(store.directory), ns=(5, 5))
    (stored,) = ModelStore.open(tmp_path / "copy", state_dir=tmp_path / "state").artifacts()
    assert stored.artifact == store.artifacts()[0].artifact


def test_damaged_and_foreign_manifests(store: ModelStore, tmp_path: Path) -> None:
    path = put(store, tmp_path, "m.gguf")
    manifest = path.with_name(path.name + ".json")
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"version": 2, "a newer": "field"}))
    assert len(store.artifacts()) == 1
    for content in ("{", "[]", json.dumps(fields | {"sha256": "short"})):
        manifest.write_text(content)
        assert "is damaged" in store.scan().broken[0].problem


def test_a_manifest_without_its_file_is_nothing(store: ModelStore, tmp_path: Path) -> None:
    path = put(store, tmp_path, "m.gguf")
    path.unlink()
    listing = store.scan()
    assert (listing.artifacts, listing.broken) == ((), ())
    assert store.lookup("m", "m.gguf") is None


def test_models_are_found_by_every_name_they_have(store: ModelStore, tmp_path: Path) -> None:
    put(store, tmp_path, "Tiny.Q8_0.gguf")
    put(store, tmp_path, "Tiny.Q4_0.gguf", file_type=2)
    for name in ("tiny.q8_0", "Tiny.Q8_0.gguf", "tiny:q8_0", "TINY:Q8_0"):
        assert store.find(name).artifact.name == "Tiny.Q8_0"
    assert store.find("tiny").artifact.family == "tiny"
    with pytest.raises(UnknownModelError, match=r"Tiny\.Q4_0, Tiny\.Q8_0"):
        store.find("tiny:f16")


def test_removing_takes_the_file_its_manifest_and_an_empty_folder(store: ModelStore, tmp_path: Path) -> None:
    path = put(store, tmp_path, "m.gguf")
    stored = store.find("m")
    assert store.remove(stored) == (path, path.with_name("m.gguf.json"))
    assert not path.parent.exists()
    with pytest.raises(NotFoundError, match="gone already"):
        store.remove(stored)


def test_removing_one_of_two_leaves_the_other(store: ModelStore, tmp_path: Path) -> None:
    put(store, tmp_path, "Tiny.Q8_0.gguf")
    put(store, tmp_path, "Tiny.Q4_0.gguf", file_type=2)
    store.remove(store.find("Tiny.Q8_0"))
    assert [stored.artifact.name for stored in store.artifacts()] == ["Tiny.Q4_0"]


def test_removing_a_reference_leaves_the_file(store: ModelStore, tmp_path: Path) -> None:
    source = write_model(tmp_path / "elsewhere" / "m.gguf")
    stored = pull_artifact(str(source), store, options=PullOptions(mode=ImportMode.REFERENCE))
    assert stored.path == source
    assert stored.referenced
    (listed,) = store.artifacts()
    assert listed == stored
    store.remove(listed)
    assert source.exists()
    assert store.artifacts() == []


def test_a_reference_to_a_file_that_went_away_says_so(store: ModelStore, tmp_path: Path) -> None:
    source = write_model(tmp_path / "elsewhere" / "m.gguf")
    pull_artifact(str(source), store, options=PullOptions(mode=ImportMode.REFERENCE))
    source.unlink()
    (broken,) = store.scan().broken
    assert "gone" in broken.problem
    store.remove(broken)
    assert store.scan().broken == ()


def test_nothing_outside_the_folder_is_removed(store: ModelStore, tmp_path: Path) -> None:
    put(store, tmp_path, "m.gguf")
    stored = store.find("m")
    precious = tmp_path / "precious.gguf"
    precious.write_text("precious")
    for place in (precious, store.directory / ".." / "precious.gguf", store.directory / "a" / "b" / "m.gguf"):
        with pytest.raises(NotFoundError, match="not in the models folder"):
            store.remove(type(stored)(stored.artifact, place, stored.info, place))
    assert precious.exists()


@pytest.mark.parametrize(
    ("family", "file"),
    [("..", "m.gguf"), ("a/b", "m.gguf"), ("a", "../m.gguf"), ("a", "m.bin"), (".partial", "m.gguf")],
)
def test_paths_never_leave_the_folder(store: ModelStore, family: str, file: str) -> None:
    with pytest.raises(InvalidRequestError):
        store.path_for(family, file)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ModelStore.open(tmp_path / "file" / "models", state_dir=tmp_path / "state")
    source = write_model(tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match="can't be made"):
        pull_artifact(str(source), store)


def test_a_lookup_of_something_broken_says_so(store: ModelStore, tmp_path: Path) -> None:
    path = put(store, tmp_path, "m.gguf")
    path.write_bytes(b"rubbish")
    with pytest.raises(ModelFileError, match="not a GGUF"):
        store.lookup("m", "m.gguf")
