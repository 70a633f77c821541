"""The conformance suite against the fake engine and against llama.cpp with a real model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from chorus.core.fleet.records import Feature
from chorus.core.generation import TextPrompt
from chorus.engine.llama import LlamaEngine
from chorus.testing.engine_conformance import CHECKS, Check, needed_by
from chorus.testing.engine_conformance_forms import FORM_CHECKS, form_needs
from chorus.testing.engine_fake import FakeEngine, FakeModel
from chorus.testing.engine_subject import Subject
from tests.engine.conftest import SETTINGS, gemma

pytestmark = pytest.mark.asyncio(loop_scope="session")
every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


def subject_of(engine: LlamaEngine, model: str) -> Subject:
    """llama.cpp's numerics differ with what is cached and what else is in the batch."""
    prompt = TextPrompt("Once upon a time")
    return Subject(engine, model, prompt, slots=2, max_queue=2, exact=False, forget=engine.forget_cache)


@every_check
async def test_fake(check: Check) -> None:
    model = FakeModel(context_length=1024)
    assert needed_by(check) <= model.features
    engine = FakeEngine([model], slots=2, max_queue=2)
    await engine.start()
    await check(Subject(engine, "fake-1b", TextPrompt("Once upon a time"), slots=2, max_queue=2, exact=True))
    await engine.stop()


@every_check
async def test_llama(check: Check, llama: LlamaEngine) -> None:
    (status,) = llama.models()
    if Feature.RERANK in needed_by(check):  # test_embedding has a model that can
        assert Feature.RERANK not in status.features
        return
    assert needed_by(check) <= status.features
    await check(subject_of(llama, "smollm2-135m-instruct"))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gemma_engine(gemma_path: Path) -> AsyncIterator[LlamaEngine]:
    """An engine with Gemma loaded: a sliding window, a large vocabulary, no chat template."""
    engine = LlamaEngine([gemma(gemma_path)], SETTINGS)
    await engine.start()
    await engine.load("")
    yield engine
    await engine.stop()


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if Feature.RERANK not in needed_by(check)], ids=lambda check: check.__name__
)
async def test_gemma(check: Check, gemma_engine: LlamaEngine) -> None:
    (status,) = gemma_engine.models()
    assert needed_by(check) <= status.features
    await check(subject_of(gemma_engine, "gemma-3-270m"))


@pytest.mark.parametrize("check", FORM_CHECKS, ids=lambda check: check.__name__)
async def test_llama_with_forms(check: Check, llama: LlamaEngine) -> None:
    (status,) = llama.models()
    assert form_needs(check) <= status.features
    await check(subject_of(llama, "smollm2-135m-instruct"))
