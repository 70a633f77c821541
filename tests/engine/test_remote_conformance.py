"""The conformance suite against servers behind HTTP, of each make: what they declare, they do."""

from __future__ import annotations

import pytest

from chorus.core.fleet.records import Feature
from chorus.core.generation import Conversation, Message, MessageRole, Prompt, TextPart, TextPrompt
from chorus.testing.engine_conformance import CHECKS, Check, a_model_is_loaded_once_and_unloads, needed_by
from chorus.testing.engine_subject import Subject
from tests.engine.upstream import Upstream, UpstreamModel, engine_of

TEXT = TextPrompt("Once upon a time")
CHAT = Conversation((Message(MessageRole.USER, (TextPart("Tell me a story"),)),))
# What each make must be able to do, at the least: a feature that is lost takes its checks along silently.
MAKES = {
    "ollama": {Feature.CHAT, Feature.TOOLS, Feature.SEED, Feature.JSON_SCHEMA, Feature.PENALTIES},
    "llamacpp": {Feature.CHAT, Feature.TOOLS, Feature.SEED, Feature.IGNORE_EOS, Feature.GRAMMAR, Feature.JSON_SCHEMA},
    "vllm": {Feature.CHAT, Feature.TOOLS, Feature.SEED, Feature.IGNORE_EOS, Feature.LOGIT_BIAS, Feature.JSON_SCHEMA},
    "somebody": {Feature.CHAT},
}
NEVER = {Feature.TOKEN_IDS, Feature.RESUME, Feature.LOGPROBS, Feature.TOKENIZE, Feature.CONTEXT_SHIFT}


@pytest.mark.parametrize("prompt", [TEXT, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_generating(check: Check, make: str, prompt: Prompt) -> None:
    async with (
        Upstream(make, UpstreamModel("tiny:latest")) as upstream,
        engine_of(upstream, context_length=512) as engine,
    ):
        (status,) = engine.models()
        assert MAKES[make] <= status.features
        assert not NEVER & status.features
        can_load = make == "ollama" or check is not a_model_is_loaded_once_and_unloads
        if needed_by(check) <= status.features and can_load:
            await check(Subject(engine, "tiny:latest", prompt, slots=2, max_queue=2, exact=True))


@pytest.mark.parametrize("make", ["ollama", "vllm"])
@pytest.mark.parametrize(
    "check", [check for check in CHECKS if needed_by(check) == {Feature.EMBED}], ids=lambda check: check.__name__
)
async def test_embedding(check: Check, make: str) -> None:
    vectors = UpstreamModel("vectors", ("embedding",), context=32)
    async with Upstream(make, vectors) as upstream, engine_of(upstream) as engine:
        (status,) = engine.models()
        assert status.features == {Feature.EMBED}
        assert status.artifact.tags == ("embedding",)
        await check(Subject(engine, "vectors", TEXT, slots=2, max_queue=2, exact=False))
