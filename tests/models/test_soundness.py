"""Files that llama.cpp would end the process over never reach it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import pytest

from chorus.core.errors import ModelFileError
from chorus.models import check_vocabulary, inspect
from chorus.testing.packaged_models import gemma_path, smollm2_path


def write(path: Path, *, tokens: list[str], layers: int = 2, **numbers: int | str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    for key, value in numbers.items():
        name = f"llama.{key.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    writer.add_tensor("token_embd.weight", np.ones((4, 64), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("count", [10, 3000])
def test_a_token_that_comes_twice_is_damage(count: int, tmp_path: Path) -> None:
    tokens = [f"token{number}" for number in range(count)]
    tokens[3] = tokens[4] = ""
    check_vocabulary(write(tmp_path / "sound.gguf", tokens=tokens))
    with pytest.raises(ModelFileError, match="two tokens of its vocabulary are the same"):
        check_vocabulary(write(tmp_path / "twice.gguf", tokens=[*tokens[:-1], tokens[0]]))
    with pytest.raises(ModelFileError, match="two tokens"):
        check_vocabulary(write(tmp_path / "cut.gguf", tokens=[*tokens[:-1], f"{tokens[0]}\0rest"]))


def test_vocabularies_of_real_models_are_sound() -> None:
    for path in (smollm2_path(), gemma_path()):
        check_vocabulary(path)
        inspect(path)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"layers": 0}, "claims 0 layers"),
        ({"layers": 513}, "claims 513 layers"),
        ({"nextn_predict_layers": 3}, "claims 3 layers for later tokens"),
        ({"expert_used_count": 2}, "claims 0 experts, 2 of them used"),
        ({"expert_count": 5000, "expert_used_count": 2}, "claims 5000 experts"),
        ({"expert_count": 8}, "claims 8 experts, 0 of them used"),
        ({"expert_count": 8, "expert_used_count": 2, "expert_group_count": 8}, "claims 8 groups of 8 experts"),
        (
            {"expert_count": 8, "expert_used_count": 2, "expert_group_count": 3, "expert_group_used_count": 1},
            "claims 3 groups",
        ),
        ({"rope__scaling__type": "linaer"}, "scales positions by 'linaer'"),
    ],
)
def test_numbers_that_end_the_process_are_damage(numbers: dict[str, int | str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=said):
        inspect(write(tmp_path / "wrong.gguf", tokens=list("abcd"), **numbers))  # type: ignore[arg-type]


def test_numbers_of_a_mixture_of_experts_are_sound(tmp_path: Path) -> None:
    numbers = {"expert_count": 8, "expert_used_count": 2, "expert_group_count": 4, "expert_group_used_count": 2}
    inspect(write(tmp_path / "moe.gguf", tokens=list("abcd"), rope__scaling__type="yarn", **numbers))


def test_whatever_is_damaged_the_process_lives(tmp_path: Path) -> None:
    """The head of a real file is overwritten here and there; what passes the checks is given to llama.cpp."""
    program = textwrap.dedent(
        """
        import logging, random, sys
        from pathlib import Path
        import structlog
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        from chorus.core.errors import EngineError, ModelFileError
        from chorus.engine.llama.binding import Model
        from chorus.models import check_vocabulary, inspect
        path, sound = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
        path.write_bytes(sound)
        outcomes = {"damaged": 0, "refused": 0, "loaded": 0}
        for seed in [94, *range(30)]:
            rng = random.Random(seed)
            changes = []
            for _ in range(rng.choice([1, 1, 3])):
                at = rng.choice([rng.randrange(4, 24), rng.randrange(4096), rng.randrange(1_700_000)])
                length = rng.choice([1, 4, 8])
                changes.append((at, rng.choice([b"\\xff" * length, bytes(length), rng.randbytes(length)])))
            with path.open("r+b") as file:
                for at, value in changes:
                    file.seek(at)
                    file.write(value)
            try:
                inspect(path)
                check_vocabulary(path)
                Model(path, vocabulary_only=True).close()
                outcomes["loaded"] += 1
            except ModelFileError:
                outcomes["damaged"] += 1
            except EngineError:
                outcomes["refused"] += 1
            with path.open("r+b") as file:
                for at, value in changes:
                    file.seek(at)
                    file.write(sound[at : at + len(value)])
        assert outcomes["damaged"] > 10 and outcomes["loaded"] > 2, outcomes
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "damaged.gguf"), str(smollm2_path())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
