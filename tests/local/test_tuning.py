"""`chorus tune` on a real model: it measures, loses nothing unasked, keeps what runs, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import structlog

from chorus.config import RunnerSettings
from chorus.core.errors import EngineError, OutOfMemoryError
from chorus.core.fitting.memory import CacheType
from chorus.core.fleet.records import ModelState
from chorus.core.generation import Finished, GenerationRequest, StopConditions, TextPrompt, TokenDelta
from chorus.core.tuning.proposal import Option
from chorus.core.tuning.search import Axis, Effort, Findings
from chorus.core.tuning.variant import Variant
from chorus.engine.llama.context import Context, ContextParams
from chorus.engine.llama.lab import Lab, Probe
from chorus.engine.llama.measuring import Workload
from chorus.local.tuning import Kept, Now, TuneOptions, Tuner
from chorus.models import ImportMode, ModelStore, PullOptions, StoredArtifact, pull_artifact
from chorus.models.tuning import TuningFolder
from chorus.runner.engines import llama_engine
from chorus.runner.tuned import this_machine
from tests.engine.conftest import smollm2_path
from tests.models.test_tuning_folder import a_tuning

BASE = Variant(threads=1)
Q8_0, Q4_0 = replace(BASE, quantization="Q8_0"), replace(BASE, quantization="Q4_0")
SETTINGS = RunnerSettings(threads=1, slots=2, context_length=256)
TINY = TuneOptions(
    Effort(budget_s=1e9, turns=1),
    seconds=0.01,
    quality_tokens=512,
    cells=128,
    streams=2,
    axes=frozenset({Axis.QUANTIZATION}),
)


def a_store(root: Path) -> tuple[ModelStore, StoredArtifact]:
    """A models folder with SmolLM2 in it."""
    store = ModelStore.open(root / "models", state_dir=root / "state")
    options = PullOptions(mode=ImportMode.REFERENCE)
    return store, pull_artifact(str(smollm2_path()), store, options=options)


def files(root: Path) -> set[str]:
    """Every file below `root`, without the digests that are remembered."""
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("state/")}


class World:
    """What a whole tuning left behind."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store, self.stored = a_store(root)
        self.folder = TuningFolder(root / "tuning")
        self.before = files(root)
        with Tuner(self.store, self.stored, SETTINGS, TINY, folder=self.folder) as tuner:
            self.findings, _, self.proposal = tuner.run()
            self.kept: Kept = tuner.keep(option_of(self.findings, Q8_0), self.findings)


def option_of(findings: Findings, variant: Variant) -> Option:
    return Option(variant, findings.gain(variant) or 0.0, 1.0, 0.0)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """llama.cpp tells a hundred lines of each load."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    yield
    structlog.configure(**before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("tune"))


@pytest.fixture
def lab() -> Iterator[Lab]:
    lab = Lab(gpu_layers=0)
    yield lab
    lab.close()


# --- measuring ------------------------------------------------------------------------------------------------------


def test_everything_is_measured(world: World) -> None:
    assert set(world.findings.records) == {BASE, Q8_0, Q4_0}
    for record in world.findings.records.values():
        assert record.problem == ""
        assert record.quality is not None
        assert 5 < record.quality.perplexity < 100
        for sample in record.samples:
            assert min(sample.prefill, sample.decode_one, sample.decode_many) > 0
    sizes = [world.findings.record(variant).memory_bytes for variant in (Q4_0, BASE, Q8_0)]
    assert sizes == sorted(sizes)


def test_eight_bits_lose_nothing_and_four_bits_are_shown_as_a_loss(world: World) -> None:
    eight, four = world.findings.loss(Q8_0), world.findings.loss(Q4_0)
    assert eight is not None
    assert four is not None
    assert abs(eight.change) < 0.01
    assert eight.is_nothing(0.02)
    assert four.change > 0.05
    assert world.proposal.free.variant != Q4_0
    assert world.proposal.with_consent(0.0) == world.proposal.free


def test_cache_types_are_measured_too(lab: Lab) -> None:
    probe = lab.probe(smollm2_path())
    work = Workload(cells=256, streams=2, prompt_tokens=32, seconds=0)
    sizes = [probe.speed(replace(BASE, cache_type=kind), work).memory_bytes for kind in (CacheType.F16, CacheType.Q8_0)]
    assert sizes[1] < sizes[0]


def test_what_kills_a_measurement_is_an_error_like_any_other(lab: Lab) -> None:
    probe = lab.probe(smollm2_path())
    with pytest.raises(EngineError, match="no quantization"):
        probe.quantize(Path("/nowhere/model.gguf"), "Q9_9", threads=1)
    assert probe.calibrate(BASE) > 0, "it goes on after an error"
    os.kill(probe.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="SIGKILL"):
        probe.calibrate(BASE)
    assert lab.probe(smollm2_path()) is not probe


def test_a_file_that_is_no_model_is_told(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EngineError, match=r"cannot load broken\.gguf"):
        lab.probe(tmp_path / "broken.gguf")


def test_a_model_that_does_not_fit_is_refused_with_numbers(tmp_path: Path) -> None:
    store, stored = a_store(tmp_path)
    settings = SETTINGS.model_copy(update={"context_length": 8192, "gpu_layers": 0})
    with (
        Tuner(store, stored, settings, replace(TINY, cells=None, streams=256), folder=TuningFolder(tmp_path)) as tuner,
        pytest.raises(OutOfMemoryError, match="streams of 8192 tokens"),
    ):
        tuner.run()


# --- keeping --------------------------------------------------------------------------------------------------------


def test_what_was_kept_is_a_model_of_the_same_family(world: World) -> None:
    made = world.store.find("SmolLM2-135M-Instruct.from-Q4_1.Q8_0")
    assert world.kept.artifact is not None
    assert made.artifact == world.kept.artifact.artifact
    assert (made.artifact.family, made.artifact.quantization) == (world.stored.artifact.family, "Q8_0")
    assert made.artifact.sha256 != world.stored.artifact.sha256
    assert world.stored.artifact.sha256 in made.source
    assert made.artifact.license == world.stored.artifact.license
    assert world.store.find(world.stored.artifact.family) == world.store.find(world.stored.artifact.name)


def test_nothing_else_is_left(world: World) -> None:
    family = world.stored.artifact.family
    file = "SmolLM2-135M-Instruct.from-Q4_1.Q8_0.gguf"
    machine = world.kept.tuning.machine
    tunings = {f"tuning/{tuning.sha256}.{machine}.json" for tuning in world.folder.all()}
    assert len(tunings) == 2
    made = {f"models/{family}/{file}", f"models/{family}/{file}.json"}
    assert files(world.root) - world.before == made | tunings


async def test_a_runner_answers_with_what_was_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chorus.models.tuning.default_tuning_dir", lambda: world.folder.directory)
    settings = SETTINGS.model_copy(update={"models_dir": world.store.directory})
    hosted = llama_engine(settings.model_copy(update={"models": (world.stored.artifact.family,)}))
    assert world.kept.artifact is not None
    name = world.kept.artifact.artifact.name
    assert hosted.models == (name,)
    named = settings.model_copy(update={"models": (world.stored.artifact.name,)})
    assert llama_engine(named).models == (world.stored.artifact.name,), "whoever names an artifact means it"
    await hosted.engine.start()
    try:
        await hosted.engine.load(name)
        request = GenerationRequest(
            world.stored.artifact.family, TextPrompt("The capital of France is"), stop=StopConditions(max_tokens=3)
        )
        events = [event async for event in hosted.engine.generate(request)]
        assert "".join(event.text for event in events if isinstance(event, TokenDelta)).strip()
        assert isinstance(events[-1], Finished)
        loaded = [model.artifact.name for model in hosted.engine.models() if model.state is ModelState.LOADED]
        assert loaded == [name]
    finally:
        await hosted.engine.stop()


async def test_a_tuning_is_applied_when_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, stored = a_store(tmp_path)
    machine = this_machine(gpu_layers=0)
    folder = TuningFolder(tmp_path / "tuning")
    facts = {"sha256": stored.artifact.sha256}
    folder.keep(a_tuning(machine, **facts, threads=1, batch_tokens=96, micro_batch_tokens=48))
    monkeypatch.setattr("chorus.models.tuning.default_tuning_dir", lambda: folder.directory)
    made: list[ContextParams] = []
    create = Context.__init__

    def note(self: Context, model: object, params: ContextParams) -> None:
        made.append(params)
        create(self, model, params)  # type: ignore[arg-type]

    monkeypatch.setattr(Context, "__init__", note)

    async def load(**changes: object) -> ContextParams:
        settings = SETTINGS.model_copy(update={"models_dir": store.directory, "gpu_layers": 0, **changes})
        hosted = llama_engine(settings)
        await hosted.engine.start()
        try:
            await hosted.engine.load(stored.artifact.name)
        finally:
            await hosted.engine.stop()
        return made[-1]

    params = await load(threads=0)
    assert (params.threads, params.threads_batch) == (1, 1)
    assert (params.batch_tokens, params.micro_batch_tokens) == (96, 48)
    assert params.cache_type is CacheType.Q8_0
    assert (await load(threads=2)).threads == 2, "what is configured goes before what was tuned"
    folder.keep(a_tuning(machine, **facts, llama_build="0.0.1 cpu"))
    with structlog.testing.capture_logs() as logs:
        params = await load()
    assert params.cache_type is CacheType.F16
    told = [line for line in logs if line["event"] == "tuning.ignored"]
    assert [line["model"] for line in told] == [stored.artifact.name]
    assert "llama.cpp 0.0.1 cpu" in told[0]["why"]


# --- interrupted ----------------------------------------------------------------------------------------------------


def test_an_interrupt_while_requantizing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, stored = a_store(tmp_path)
    before = files(tmp_path)
    pids: list[int] = []
    answer = Probe._answer

    def interrupted(self: Probe) -> object:
        pids.append(self.pid)
        if requantizing:
            raise KeyboardInterrupt
        return answer(self)

    requantizing: list[str] = []

    def tell(now: Now) -> None:
        if now.words.startswith("requantizing"):
            requantizing.append(now.words)

    monkeypatch.setattr(Probe, "_answer", interrupted)
    options = replace(TINY, quality_tokens=64)
    with (
        pytest.raises(KeyboardInterrupt),
        Tuner(store, stored, SETTINGS, options, folder=TuningFolder(tmp_path / "tuning"), tell=tell) as tuner,
    ):
        tuner.run()
    assert requantizing == ["requantizing to Q8_0"]
    assert files(tmp_path) == before
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_command_and_what_it_started(tmp_path: Path, by: signal.Signals) -> None:
    store, stored = a_store(tmp_path)
    before = files(tmp_path)
    environment = {
        **os.environ,
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "CHORUS_RUNNER__MODELS_DIR": str(store.directory),
        "CHORUS_RUNNER__THREADS": "1",
        "CHORUS_RUNNER__CONTEXT_LENGTH": "256",
    }
    command = [sys.executable, "-m", "chorus.cli.main", "tune", stored.artifact.name, "--yes"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "speed" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(by)
        process.stderr.read()
        assert process.wait() == 130
    assert not any(child.is_running() for child in children)
    assert files(tmp_path) == before
