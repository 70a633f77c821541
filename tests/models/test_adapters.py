"""LoRA adapters on disk: what is read of them, which model they belong to, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.errors import ModelFileError
from chorus.models import ModelStore, check_fit, inspect, read_adapter
from tests.models.tiny import write_adapter, write_model

Q0 = "blk.0.attn_q.weight"


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore.open(tmp_path / "models", state_dir=tmp_path / "state")


def test_a_sound_adapter_is_read_and_fits_its_model(tmp_path: Path) -> None:
    model = inspect(write_model(tmp_path / "model.gguf"))
    adapter = read_adapter(write_adapter(tmp_path / "pirate.gguf", alpha=8.0, base="Tiny Test"))
    assert (adapter.name, adapter.architecture, adapter.rank, adapter.alpha) == ("pirate", "llama", 4, 8.0)
    assert [pair.weight for pair in adapter.pairs] == [Q0, "blk.1.attn_q.weight"]
    assert adapter.names_base("tiny-test")
    assert not adapter.names_base("other", "")
    check_fit(adapter, model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": None}, "no adapter"),
        ({"kind": "model"}, "no adapter"),
        ({"method": None}, "'none'"),
        ({"method": "control_vector"}, "only those of type 'lora'"),
        ({"alpha": "much"}, "float32"),
        ({"alpha": float("nan")}, "damaged"),
        ({"pairs": []}, "no tensors"),
        ({"extra": [("blk.0.attn_q.bias", (64,))]}, "no part"),
        ({"extra": [("blk.0.attn_k.weight.lora_a", (4, 64))]}, "one is missing"),
        ({"pairs": [(Q0, (64,), (64,))]}, "no matrix"),
        ({"dtype": np.int32}, "stored as I32"),
    ],
)
def test_a_file_that_is_no_sound_adapter_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    path = write_adapter(tmp_path / "bad.gguf", **changes)  # type: ignore[arg-type]
    with pytest.raises(ModelFileError, match=words):
        read_adapter(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "gemma3"}, "architecture 'gemma3'"),
        ({"pairs": [("blk.9.attn_q.weight", (4, 64), (64, 4))]}, "does not have"),
        ({"pairs": [(Q0, (4, 32), (64, 4))]}, "made for another model"),
        ({"pairs": [(Q0, (4, 64), (32, 4))]}, "made for another model"),
        ({"pairs": [(Q0, (4, 64), (64, 5))]}, "made for another model"),
        ({"pairs": [(Q0, (2, 4, 64), (2, 64, 4))]}, "made for another model"),
        ({"pairs": [(Q0, (4, 64), (2, 64, 4))]}, "made for another model"),
        ({"pairs": [("token_embd.weight", (16, 4), (64, 4))]}, "token embedding"),
    ],
)
def test_an_adapter_of_another_model_does_not_fit(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    model = inspect(write_model(tmp_path / "model.gguf"))
    adapter = read_adapter(write_adapter(tmp_path / "bad.gguf", **changes))  # type: ignore[arg-type]
    with pytest.raises(ModelFileError, match=words):
        check_fit(adapter, model)


def test_norms_beside_the_factors_are_left_out(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.gguf", extra=[("blk.0.attn_norm.weight", (64,))])
    assert len(read_adapter(path).pairs) == 2


def test_adapters_are_found_in_the_folder_and_below_with_their_models(store: ModelStore) -> None:
    write_model(store.directory / "alpha" / "Alpha.Q8_0.gguf")
    write_model(store.directory / "Other.gguf", architecture="gemma3")
    write_adapter(store.directory / "adapters" / "pirate.gguf")
    write_adapter(store.directory / "poet.gguf", seed=8)
    listing = store.scan()
    assert not listing.broken
    by_model = {
        stored.artifact.name: [adapter.info.name for adapter in listing.adapters_of(stored)]
        for stored in listing.artifacts
    }
    assert by_model == {"Alpha.Q8_0": ["pirate", "poet"], "Other": []}


def test_an_adapter_that_names_its_model_belongs_to_that_one_alone(store: ModelStore) -> None:
    write_model(store.directory / "One.gguf", name="First One")
    write_model(store.directory / "Two.gguf", name="Second One")
    write_adapter(store.directory / "named.gguf", base="Second-One")
    write_adapter(store.directory / "free.gguf", base="Somebody Else's")
    found = {adapter.info.name: [path.name for path in adapter.models] for adapter in store.scan().adapters}
    assert found == {"named": ["Two.gguf"], "free": ["One.gguf", "Two.gguf"]}


def test_an_adapter_without_a_model_or_with_a_taken_name_is_broken(store: ModelStore) -> None:
    write_model(store.directory / "Model.gguf")
    write_adapter(store.directory / "a" / "same.gguf")
    write_adapter(store.directory / "b" / "same.gguf")
    write_adapter(store.directory / "lost.gguf", architecture="qwen3")
    truncated = write_adapter(store.directory / "short.gguf")
    os.truncate(truncated, truncated.stat().st_size - 100)
    listing = store.scan()
    assert [adapter.info.path.parent.name for adapter in listing.adapters] == ["a"]
    problems = {broken.place.relative_to(store.directory).as_posix(): broken.problem for broken in listing.broken}
    assert "has this name already" in problems["b/same.gguf"]
    assert "'qwen3'" in problems["lost.gguf"]
    assert "truncated" in problems["short.gguf"]


def test_an_adapter_is_read_again_only_when_its_file_has_changed(store: ModelStore) -> None:
    write_model(store.directory / "Model.gguf")
    path = write_adapter(store.directory / "a.gguf")
    (first,) = store.scan().adapters
    (again,) = store.scan().adapters
    assert again.info is first.info
    write_adapter(path, alpha=2.0)
    (changed,) = store.scan().adapters
    assert changed.stamp != first.stamp
    assert changed.info.alpha == 2.0
    path.unlink()
    assert store.scan().adapters == ()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_adapter_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.gguf"
    content = bytearray(write_adapter(path).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 500))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        adapter = read_adapter(path)
    except ModelFileError:
        return
    assert adapter.pairs
