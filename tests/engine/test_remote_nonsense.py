"""Whatever a server says, it costs nobody more than an error."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import ChorusError, PromptTooLongError
from chorus.core.fleet.records import Artifact, Feature, ModelState, ModelStatus, Tier
from chorus.engine.remote.dialect import RemoteModel
from chorus.engine.remote.failures import failure, message_of
from chorus.engine.remote.ollama import OllamaReader
from chorus.engine.remote.openai import OpenAiReader
from tests.engine.upstream import Upstream, UpstreamModel, engine_of, until

ARTIFACT = Artifact("tiny", "tiny", "", 1, "Q8_0", 1, 512, "llama", Tier.MICRO)
MODEL = RemoteModel("tiny", ModelStatus(ARTIFACT, "x", ModelState.LOADED, frozenset(Feature), 512, 1))
WORDS = st.sampled_from(
    ["message", "content", "response", "thinking", "tool_calls", "function", "name", "arguments", "done", "done_reason",
     "choices", "delta", "text", "finish_reason", "stop_reason", "usage", "timings", "prompt_tokens", "error", "index",
     "eval_count", "cache_n", "predicted_ms", "id", "prompt_tokens_details", "cached_tokens", "reasoning", "code",
     "n_ctx", "n_prompt_tokens", "detail", "object", "length", "stop"]
)  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
NONSENSE: list[Any] = [
    [],
    {},
    7,
    b"<html>",
    {"models": [3, {}, {"model": "tiny:latest", "digest": [], "details": [], "size": "big"}], "model_info": [1]},
    {"models": [{"model": "x"}], "capabilities": [[], 1], "modelfile": 5, "details": {"parameter_size": {}}},
    {"data": [1, {"id": 5}, {"id": "x", "meta": [], "owned_by": 3, "max_model_len": -1}]},
    {"data": [{"id": "x", "owned_by": "llamacpp", "embedding": "y"}], "modalities": 3, "total_slots": "many"},
]


@given(st.lists(ANYTHING, max_size=4))
def test_lines_of_any_kind_are_read_or_refused(lines: list[Any]) -> None:
    ollama, openai = OllamaReader("x", MODEL), OpenAiReader("x", MODEL)
    for line in lines:
        encoded = json.dumps(line).encode()
        for read, said in ((ollama.read, encoded), (openai.read, b"data: " + encoded), (openai.read, encoded)):
            with contextlib.suppress(ChorusError):
                piece = read(said)
                (piece.text + piece.reasoning + "".join(call.arguments_json for call in piece.tool_calls)).encode()


@given(st.integers(0, 600), st.binary(max_size=50) | ANYTHING.map(lambda value: json.dumps(value).encode()), st.text())
def test_every_refusal_becomes_an_error(status: int, body: bytes, retry_after: str) -> None:
    error = failure(status, body, server="x", model="tiny", context_length=512, retry_after=retry_after)
    assert isinstance(error, ChorusError)
    assert len(error.message) < 1000
    assert message_of(body).isprintable()
    assert error.retry_after_s is None or 0 < error.retry_after_s <= 3600
    assert not isinstance(error, PromptTooLongError) or error.prompt_tokens > 0


@pytest.mark.parametrize("make", ["ollama", "llamacpp", "vllm", "somebody"])
@pytest.mark.parametrize("nonsense", NONSENSE, ids=str)
async def test_a_server_that_talks_nonsense_is_listened_to_again(make: str, nonsense: Any) -> None:
    upstream = Upstream(make, UpstreamModel())
    upstream.nonsense = nonsense
    async with upstream, engine_of(upstream, poll_s=0.02) as engine:
        assert isinstance(engine.models(), tuple)
        upstream.nonsense = None
        await until(lambda: [status.artifact.name for status in engine.models()] == ["tiny:latest"], engine)
