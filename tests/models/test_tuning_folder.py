"""What was tuned is found again on the machine that it was tuned on, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from chorus.core.errors import ConfigError
from chorus.core.fitting.memory import CacheType
from chorus.models.naming import family_of_file, quantization_of_file, requantized_file
from chorus.models.tuning import Machine, Tuning, TuningFolder

HERE = Machine("0123456789abcdef", "0.3.36 cpu", offload=False)
ELSEWHERE = Machine("fedcba9876543210", "0.3.36 cpu", offload=False)
SHA = "ab" * 32


def a_tuning(machine: Machine = HERE, **changes: object) -> Tuning:
    """One of a model with the SHA-256 abab..."""
    facts: dict[str, object] = {
        "model": "Tiny.Q4_1",
        "family": "tiny",
        "sha256": SHA,
        "machine": machine.identity,
        "cpu": "A CPU",
        "llama_build": machine.llama_build,
        "offload": machine.offload,
        "tuned_at": "2026-11-26T05:00:00+00:00",
        "threads": 3,
        "batch_tokens": 512,
        "micro_batch_tokens": 256,
        "cache_type": CacheType.Q8_0,
        "streams": 4,
        "prefill": 100.0,
        "decode_one": 20.0,
        "decode_many": 50.0,
        "gain": 1.5,
    }
    return Tuning(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> TuningFolder:
    return TuningFolder(tmp_path / "tuning")


def test_kept_found_and_forgotten(folder: TuningFolder) -> None:
    assert folder.all() == []
    assert folder.find(SHA, HERE).tuning is None
    tuning = a_tuning()
    path = folder.keep(tuning)
    assert folder.find(SHA, HERE).tuning == tuning
    assert folder.find("cd" * 32, HERE) == folder.find("ef" * 32, HERE)
    better = a_tuning(threads=4)
    assert folder.keep(better) == path
    assert folder.all() == [better]
    assert list(folder.directory.iterdir()) == [path], "nothing half-written is left"
    folder.forget(better)
    folder.forget(better)
    assert folder.all() == []


def test_each_machine_has_its_own(folder: TuningFolder) -> None:
    folder.keep(a_tuning(ELSEWHERE, threads=9))
    found = folder.find(SHA, HERE)
    assert found.tuning is None
    assert "another machine" in found.ignored
    folder.keep(a_tuning())
    assert len(folder.all()) == 2
    here, there = folder.find(SHA, HERE).tuning, folder.find(SHA, ELSEWHERE).tuning
    assert here is not None
    assert there is not None
    assert (here.threads, there.threads) == (3, 9)


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (Machine(HERE.identity, "0.3.37 cpu", offload=False), "llama.cpp 0.3.36 cpu"),
        (Machine(HERE.identity, HERE.llama_build, offload=True), "without a graphics device"),
    ],
)
def test_what_was_measured_otherwise_is_ignored_and_told(folder: TuningFolder, machine: Machine, why: str) -> None:
    folder.keep(a_tuning())
    found = folder.find(SHA, machine)
    assert found.tuning is None
    assert why in found.ignored


@pytest.mark.parametrize("content", ["", "{}", '{"version": 1}', "no json", "[" * 100])
def test_a_damaged_file_is_no_tuning(folder: TuningFolder, content: str) -> None:
    folder.keep(a_tuning()).write_text(content)
    found = folder.find(SHA, HERE)
    assert found.tuning is None
    assert "damaged" in found.ignored
    assert folder.all() == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        TuningFolder(tmp_path / "file").keep(a_tuning())


@pytest.mark.parametrize(
    ("file", "made"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.from-Q4_1.Q8_0.gguf"),
        ("model-q4_1.gguf", "model.from-Q4_1.Q8_0.gguf"),
        ("plain.gguf", "plain.from-Q4_1.Q8_0.gguf"),
    ],
)
def test_a_requantized_file_says_what_it_was_made_from(file: str, made: str) -> None:
    assert requantized_file(file, "Q4_1", "Q8_0") == made
    assert quantization_of_file(made) == "Q8_0"
    assert family_of_file(made).startswith(family_of_file(file))
