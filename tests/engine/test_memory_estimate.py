"""The memory estimate against the sizes of the buffers that llama.cpp logs as it allocates them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from chorus.core.fitting.memory import CacheType, estimate_memory
from chorus.engine.llama import LlamaSettings, log
from chorus.engine.llama.binding import Model
from chorus.engine.llama.context import Context
from chorus.engine.llama.sizing import context_params, load_plan
from chorus.models import inspect, shape_of
from chorus.testing.packaged_models import gemma_path, smollm2_path

MIB = 1 << 20
BUFFER = re.compile(r"\b(model|KV|compute|output) buffer size\s*=\s*([\d.]+) MiB")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What llama.cpp logs, whatever level is kept in these tests."""
    lines: list[str] = []

    def note(_: str, message: str) -> None:
        lines.append(message)

    monkeypatch.setattr(log, "_log", SimpleNamespace(debug=note, info=note, warning=note))
    return lines


def allocated(path: Path, settings: LlamaSettings, context: int, told: list[str]) -> dict[str, float]:
    """MiB of each kind of buffer."""
    model = Model(path)
    Context(model, context_params(settings, context, shares_prefixes=model.copies_prefixes)).close()
    model.close()
    sizes: dict[str, float] = {}
    for line in told:
        found = BUFFER.search(line)
        if found is not None:
            sizes[found[1]] = sizes.get(found[1], 0.0) + float(found[2])
    return sizes


CASES = [
    (smollm2_path, LlamaSettings(slots=2, threads=1), 256),
    (smollm2_path, LlamaSettings(slots=4, threads=1, cached_sequences=0), 2048),
    (smollm2_path, LlamaSettings(slots=16, threads=1, kv_tokens=4096), 1024),
    (smollm2_path, LlamaSettings(slots=2, threads=1, cache_type=CacheType.Q8_0), 2048),
    (smollm2_path, LlamaSettings(slots=2, threads=1, flash_attention=False, batch_tokens=128), 1024),
    (gemma_path, LlamaSettings(slots=2, threads=1), 512),
    (gemma_path, LlamaSettings(slots=16, threads=1, batch_tokens=256), 512),
]


@pytest.mark.parametrize(("path", "settings", "context"), CASES)
def test_it_is_within_ten_percent_of_what_llama_cpp_allocates(
    path: Callable[[], Path], settings: LlamaSettings, context: int, told: list[str]
) -> None:
    file = path()
    sizes = allocated(file, settings, context, told)
    estimate = estimate_memory(shape_of(inspect(file)), load_plan(context_params(settings, context)))
    assert set(sizes) == {"model", "KV", "compute", "output"}
    assert estimate.cache_bytes == pytest.approx(sizes["KV"] * MIB, rel=0.01)
    assert estimate.compute_bytes == pytest.approx(sizes["compute"] * MIB, rel=0.1)
    assert estimate.output_bytes == pytest.approx(sizes["output"] * MIB, rel=0.1, abs=16 * 4 * 262_144)
    assert estimate.total_bytes == pytest.approx(sum(sizes.values()) * MIB, rel=0.1)
