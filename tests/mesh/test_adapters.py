"""LoRA adapters from the models folder to the answer: found, placed by name, refused honestly; and draft models."""

from __future__ import annotations

from pathlib import Path

import pytest

from chorus.cli.status import _rows
from chorus.config import RunnerSettings
from chorus.core.errors import NotFoundError
from chorus.core.generation import GenerationRequest, Sampling, StopConditions, TextPrompt
from chorus.engine.llama import LlamaEngine, LlamaSettings
from chorus.engine.llama.sizing import wish_of
from chorus.runner.engines import HostedEngine, llama_engine
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from tests.engine.conftest import smollm2_path
from tests.models.tiny import write_adapter

PAIRS = [(f"blk.{layer}.attn_q.weight", (8, 576), (576, 8)) for layer in range(0, 30, 3)]


def folder_with_smollm2(folder: Path) -> Path:
    folder.mkdir()
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(smollm2_path())
    return folder


def hosted(folder: Path, **settings: object) -> HostedEngine:
    given = {"models_dir": folder, "slots": 2, "context_length": 128, "threads": 1, "models": [], **settings}
    return llama_engine(RunnerSettings.model_validate(given))


def ask(adapter: str, model: str = "") -> GenerationRequest:
    return GenerationRequest(
        model,
        TextPrompt("Once upon a time"),
        sampling=Sampling(temperature=0.0),
        stop=StopConditions(max_tokens=8, ignore_eos=True),
        adapter=adapter,
    )


async def test_a_request_that_names_an_adapter_goes_where_it_is(certificates: MeshCertificates, tmp_path: Path) -> None:
    folder = folder_with_smollm2(tmp_path / "models")
    write_adapter(folder / "adapters" / "nothing.gguf", pairs=PAIRS, scale=0.0)
    write_adapter(folder / "adapters" / "pirate.gguf", pairs=PAIRS, scale=2.0)
    host = hosted(folder)
    async with InProcessMesh(runners=[FakeEngine(), host.engine], certificates=certificates) as mesh:
        client = mesh.client()
        plain = await client.complete(ask("", "smollm2-135m-instruct"))
        nothing = await client.complete(ask("nothing"))  # no model named: the adapter chooses it
        pirate = await client.complete(ask("", "smollm2-135m-instruct"), adapter="pirate")
        assert plain.text == nothing.text != pirate.text
        with pytest.raises(NotFoundError, match="there are: nothing, pirate"):
            await client.complete(ask("lawyer", "smollm2-135m-instruct"))
        nodes = (await client.list_nodes()).nodes
        rows = [row for entry in nodes for leased in entry.runners for row in _rows(leased)]
        assert any("with nothing, pirate" in str(cell) for row in rows for cell in row)


async def test_an_adapter_put_into_the_folder_is_offered_at_the_next_look(tmp_path: Path) -> None:
    folder = folder_with_smollm2(tmp_path / "models")
    host = hosted(folder)
    await host.engine.start()
    try:
        assert host.engine.models()[0].adapters == ()
        write_adapter(folder / "poet.gguf", pairs=PAIRS)
        assert host.refresh is not None
        await host.refresh()
        assert host.engine.models()[0].adapters == ("poet",)
    finally:
        await host.engine.stop()


async def test_a_draft_model_is_found_by_name_and_its_memory_counted(tmp_path: Path) -> None:
    folder = folder_with_smollm2(tmp_path / "models")
    (folder / "Tiny.Q4_1.gguf").symlink_to(smollm2_path())
    engine = hosted(folder, draft_models={"smollm2-135m-instruct": "tiny"}).engine
    assert isinstance(engine, LlamaEngine)
    sources = {source.artifact.name: source for source in engine._sources}
    large, tiny = sources["SmolLM2-135M-Instruct.Q4_1"], sources["Tiny.Q4_1"]
    assert large.draft is not None
    assert large.draft.path == tiny.path
    assert tiny.draft is None
    footprints = [wish_of(source, LlamaSettings(), 512).footprint for source in (large, tiny)]
    assert footprints[0].companion_bytes > 0.8 * footprints[1].total_bytes, "it keeps nothing of finished requests"
    assert footprints[0].total_bytes == footprints[1].total_bytes + footprints[0].companion_bytes
    missing = hosted(folder, draft_models={"smollm2-135m-instruct": "not-here"}).engine
    assert isinstance(missing, LlamaEngine)
    assert all(source.draft is None for source in missing._sources)


def test_a_model_does_not_draft_for_itself() -> None:
    with pytest.raises(ValueError, match="draft for itself"):
        RunnerSettings.model_validate({"draft_models": {"a": "a"}})
    assert RunnerSettings.model_validate({"draft_models": "large=small"}).draft_models == {"large": "small"}
