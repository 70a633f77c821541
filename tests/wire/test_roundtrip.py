"""Whatever core can say, the wire carries; whatever the wire may bring, decoding refuses or understands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from chorus.api.inference.v1 import content_pb2, embedding_pb2, generation_pb2, rerank_pb2
from chorus.api.registry.v1 import registry_pb2
from chorus.api.runner.v1 import resources_pb2
from chorus.core import generation as core
from chorus.core.errors import InvalidRequestError
from chorus.core.fleet.events import DirectoryEvent
from chorus.core.fleet.records import RunnerRecord
from chorus.testing.fake_model import fake_artifact
from chorus.wire import directory, embedding, events, generation, rerank, resources

from . import strategies as some

PARTS = [content_pb2.Part(text="x")] * 20_001
BULKY = "x" * 300_000
ORIGIN = events.Origin("request", "node", "runner", 7, 2)


@given(some.requests())
def test_a_request_survives_the_wire(request: core.GenerationRequest) -> None:
    raw = generation.encode_generation(request).SerializeToString()
    assert generation.decode_generation(generation_pb2.GenerationSpec.FromString(raw)) == request


@given(some.embedding_requests)
def test_texts_to_embed_survive_the_wire(request: core.EmbeddingRequest) -> None:
    assert embedding.decode_embedding(embedding.encode_embedding(request)) == request


@given(some.rerank_requests)
def test_documents_to_rank_survive_the_wire(request: core.RerankRequest) -> None:
    assert rerank.decode_rerank(rerank.encode_rerank(request)) == request


def test_a_ranking_survives_the_wire() -> None:
    ranking = core.Ranking((core.Ranked(1, 2.5), core.Ranked(0, -1.0, truncated=True)), 17)
    artifact = fake_artifact()
    message = rerank.encode_ranking(artifact, ranking, node_id="n", runner_id="r")
    assert rerank.decode_ranking(message) == ranking
    assert (message.model, message.artifact_sha256) == (artifact.family, artifact.sha256)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"top_n": 0}, "top_n"),
        ({"truncation": 9}, "truncation"),
    ],
)
def test_a_rerank_request_that_makes_no_sense_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        rerank.decode_rerank(rerank_pb2.RerankSpec(**{"query": "q", "documents": ["d"], **changes}))
    assert caught.value.metadata["field"] == field


def rounded(value: Any) -> Any:
    """`value` with every float rounded to what a Duration keeps."""
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-6, abs=1e-8)
    if isinstance(value, tuple):
        return tuple(rounded(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: rounded(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def as_dict(value: Any) -> Any:
    """`value` in the shape of `rounded`."""
    if isinstance(value, tuple):
        return tuple(as_dict(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def encoded(event: core.Event) -> generation_pb2.GenerationEvent:
    message = generation_pb2.GenerationEvent()
    events.encode_event(event, ORIGIN, message)
    return message


@given(some.stream_events)
def test_an_event_survives_the_wire(event: core.Event) -> None:
    decoded = events.decode_event(encoded(event))
    assert type(decoded) is type(event)
    assert as_dict(decoded) == rounded(event)


@given(some.starts)
def test_a_start_carries_its_origin(started: core.Started) -> None:
    assert events.decode_event(encoded(started)) == events.StartedAt(started, ORIGIN)


@given(some.runner_records())
def test_a_runner_record_survives_the_wire(record: RunnerRecord) -> None:
    raw = resources.encode_runner_record(record, lease_age_s=1.5).SerializeToString()
    assert resources.decode_runner_record(resources_pb2.RunnerRecord.FromString(raw)) == record


@given(some.directory_events)
def test_a_directory_event_survives_the_wire(event: DirectoryEvent) -> None:
    raw = directory.encode_directory_event(event).SerializeToString()
    assert directory.decode_directory_event(registry_pb2.DirectoryEvent.FromString(raw)) == event


@pytest.mark.parametrize(
    ("message_type", "decode"),
    [
        (generation_pb2.GenerationSpec, generation.decode_generation),
        (embedding_pb2.EmbeddingSpec, embedding.decode_embedding),
        (rerank_pb2.RerankSpec, rerank.decode_rerank),
        (resources_pb2.RunnerRecord, resources.decode_runner_record),
        (generation_pb2.GenerationEvent, events.decode_event),
        (registry_pb2.DirectoryEvent, directory.decode_directory_event),
        (registry_pb2.NodeFilter, directory.decode_filter),
    ],
)
@given(data=st.data())
def test_raw_bytes_are_understood_or_refused(
    message_type: Any, decode: Callable[[Any], object], data: st.DataObject
) -> None:
    raw = data.draw(st.binary(max_size=64))
    try:
        message = message_type.FromString(raw)
    except DecodeError:
        return
    refusal: InvalidRequestError | None = None
    try:
        decode(message)
    except InvalidRequestError as error:
        refusal = error
    assert refusal is None or refusal.metadata["field"]


def going_on(spec: Any, **delivered: Any) -> None:
    spec.resume.allow_text = True
    spec.resume.choices.add(**delivered)


def called_with(spec: Any, arguments: str) -> None:
    message = spec.conversation.messages.add(role=content_pb2.MESSAGE_ROLE_ASSISTANT)
    message.parts.add().tool_call.MergeFrom(content_pb2.ToolCall(id="a", name="f", arguments_json=arguments))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda spec: spec.ClearField("prompt"), "input"),
        (lambda spec: spec.tools.add(name="f"), "tools"),
        (lambda spec: setattr(spec, "tool_choice", 3), "tool_choice"),
        (lambda spec: setattr(spec, "choice_count", 0), "choice_count"),
        (lambda spec: setattr(spec, "choice_count", 129), "choice_count"),
        (lambda spec: setattr(spec, "logprobs", 21), "logprobs"),
        (lambda spec: setattr(spec, "json_schema", "{"), "json_schema"),
        (lambda spec: setattr(spec, "json_schema", '{"const": NaN}'), "json_schema"),
        (lambda spec: setattr(spec, "json_schema", '{"const": "\\ud800"}'), "json_schema"),
        (lambda spec: called_with(spec, "[-1e999]"), "conversation.messages[0].parts[0].tool_call.arguments_json"),
        (lambda spec: setattr(spec, "priority", 99), "priority"),
        (lambda spec: setattr(spec.sampling, "temperature", float("nan")), "sampling.temperature"),
        (lambda spec: setattr(spec.sampling, "temperature", float("inf")), "sampling.temperature"),
        (lambda spec: setattr(spec.sampling, "top_p", 0.0), "sampling.top_p"),
        (lambda spec: spec.sampling.logit_bias.add(token_id=1, bias=101), "sampling.logit_bias.bias"),
        (lambda spec: setattr(spec.stop, "max_tokens", 0), "stop.max_tokens"),
        (lambda spec: spec.stop.strings.append(""), "stop.strings"),
        (lambda spec: spec.stop.strings.extend("abcdefghijklmnopq"), "stop.strings"),
        (lambda spec: spec.stop.strings.append("a" * 1001), "stop.strings"),
        (lambda spec: [spec.conversation.messages.add() for _ in range(20_001)], "conversation.messages"),
        (lambda spec: spec.conversation.messages.add().parts.extend(PARTS), "conversation.messages.parts"),
        (lambda spec: spec.conversation.template_variables.update({"a": 2 * BULKY}), "conversation.template_variables"),
        (lambda spec: [spec.tools.add().parameters.update({"a": BULKY}) for _ in range(2)], "tools.parameters"),
        (lambda spec: spec.requirements.labels.update({str(n): "" for n in range(257)}), "requirements.labels"),
        (lambda spec: spec.requirements.runner_ids.extend(["r"] * 257), "requirements.runner_ids"),
        (lambda spec: setattr(spec.requirements, "artifact_sha256", "XY"), "requirements.artifact_sha256"),
        (lambda spec: spec.resume.choices.add(choice=1), "resume.choices[0].choice"),
        (lambda spec: spec.resume.choices.add(text="so far"), "resume.choices[0].text"),
        (lambda spec: going_on(spec, text="gr\u00fc\u00df", token_count=7), "resume.choices[0].token_count"),
        (lambda spec: going_on(spec, token_count=1), "resume.choices[0].token_count"),
        (lambda spec: going_on(spec, token_ids=[1, 2], token_count=1), "resume.choices[0].token_count"),
        (lambda spec: spec.conversation.SetInParent(), "conversation.messages"),
        (lambda spec: spec.conversation.messages.add(role=2), "conversation.messages[0].parts"),
        (lambda spec: spec.conversation.messages.add().parts.add(text="x"), "conversation.messages[0].role"),
    ],
)
def test_a_wrong_field_is_named(change: Callable[[Any], object], field: str) -> None:
    spec = generation_pb2.GenerationSpec(prompt="hello")
    change(spec)
    with pytest.raises(InvalidRequestError) as caught:
        generation.decode_generation(spec)
    assert caught.value.metadata["field"] == field
