"""Hypothesis strategies for whatever core can say about requests, events, nodes and runners."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from chorus.core import generation as core
from chorus.core.fleet import events as fleet
from chorus.core.fleet import records

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
text = st.text(max_size=12)
name = st.text(min_size=1, max_size=12)
texts = st.lists(text, max_size=2).map(tuple)
token_ids = st.lists(uint32, max_size=4).map(tuple)
some_token_ids = st.lists(uint32, min_size=1, max_size=4).map(tuple)
labels = st.dictionaries(name, text, max_size=2)
seconds = st.integers(0, 10**12).map(lambda nanos: nanos / 1e9)


def f32(low: float, high: float, *, exclude_min: bool = False) -> st.SearchStrategy[float]:
    """Floats that survive 32 bits, the width that sampling parameters have on the wire."""
    return st.floats(low, high, width=32, exclude_min=exclude_min)


parts = st.one_of(
    st.builds(core.TextPart, text),
    st.builds(core.ImagePart, st.binary(min_size=1, max_size=4), text),
    st.builds(core.ToolCall, text, name, st.sampled_from(["{}", '{"a": 1}'])),
    st.builds(core.ToolResult, text, text, st.booleans()),
    st.builds(core.ReasoningPart, text),
)
turns = st.builds(
    core.Message, st.sampled_from(core.MessageRole), st.lists(parts, min_size=1, max_size=3).map(tuple), text
)
json_objects = st.dictionaries(
    name, st.one_of(text, st.booleans(), st.none(), st.integers(-9, 9).map(float)), max_size=2
)
conversations = st.builds(core.Conversation, st.lists(turns, min_size=1, max_size=3).map(tuple), json_objects)
prompts = st.one_of(st.builds(core.TextPrompt, text), st.builds(core.TokenPrompt, some_token_ids), conversations)
tools = st.builds(core.Tool, st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True), text, json_objects, st.booleans())
samplings = st.builds(
    core.Sampling,
    temperature=f32(0, 5),
    top_k=uint32,
    top_p=f32(0, 1, exclude_min=True),
    min_p=f32(0, 1),
    typical_p=f32(0, 1, exclude_min=True),
    repetition_penalty=f32(0, 10, exclude_min=True),
    presence_penalty=f32(-2, 2),
    frequency_penalty=f32(-2, 2),
    penalty_window=uint32,
    dry=st.none() | st.builds(core.Dry, f32(0.5, 2), f32(1, 4), uint32, st.none() | uint32),
    xtc=st.none() | st.builds(core.Xtc, f32(0.125, 1), f32(0, 0.5)),
    logit_bias=st.dictionaries(uint32, f32(-100, 100), max_size=3),
    seed=st.none() | uint64,
)
stops = st.builds(
    core.StopConditions,
    st.none() | st.integers(1, 2**32 - 1),
    st.lists(name, max_size=3).map(tuple),
    token_ids,
    st.booleans(),
)
constraints = st.one_of(
    st.builds(core.Constraint, st.just(core.ConstraintKind.GRAMMAR), name),
    st.builds(core.Constraint, st.just(core.ConstraintKind.JSON_SCHEMA), st.just('{"type": "object"}')),
    st.builds(core.Constraint, st.just(core.ConstraintKind.REGEX), name),
)
requirements = st.builds(
    core.Requirements,
    labels,
    st.none() | st.sampled_from(records.Tier),
    texts,
    uint32,
    st.sampled_from(["", "ab" * 32]),
    texts,
    texts,
    st.booleans(),
)


@st.composite
def delivered(draw: st.DrawFn, number: int, *, from_text: bool) -> core.DeliveredChoice:
    """What a choice has delivered, as ids or, where that is allowed, as text."""
    if not from_text:
        return core.DeliveredChoice(number, draw(token_ids))
    said = draw(text)
    return core.DeliveredChoice(number, (), said, draw(st.integers(0, len(said.encode()))))


@st.composite
def requests(draw: st.DrawFn) -> core.GenerationRequest:
    """Requests that are within every documented range."""
    prompt = draw(prompts)
    count = draw(st.integers(1, 128))
    choices = draw(st.lists(st.integers(0, count - 1), unique=True, max_size=3))
    allow_text = draw(st.booleans())
    offered = draw(st.lists(tools, max_size=2).map(tuple)) if isinstance(prompt, core.Conversation) else ()
    return core.GenerationRequest(
        model=draw(text),
        prompt=prompt,
        tools=offered,
        tool_choice=draw(st.sampled_from(core.ToolChoice)) if offered else core.ToolChoice.AUTO,
        sampling=draw(samplings),
        stop=draw(stops),
        choice_count=count,
        logprobs=draw(st.none() | st.integers(0, 20)),
        prompt_logprobs=draw(st.none() | st.integers(0, 20)),
        constraint=draw(st.none() | constraints),
        resume=tuple(draw(delivered(number, from_text=allow_text)) for number in choices),
        allow_text_resume=allow_text,
        priority=draw(st.sampled_from(core.Priority)),
        requirements=draw(requirements),
        adapter=draw(text),
        context_shift=draw(st.booleans()),
        session_id=draw(text),
    )


embedding_requests = st.builds(
    core.EmbeddingRequest,
    text,
    st.lists(text | some_token_ids, min_size=1, max_size=3).map(tuple),
    st.booleans(),
    st.sampled_from([None, "start", "end"]),
    st.sampled_from(core.Priority),
    requirements,
)

rerank_requests = st.builds(
    core.RerankRequest,
    text,
    text.filter(bool),
    st.lists(text, min_size=1, max_size=3).map(tuple),
    st.none() | st.integers(1, 2**32 - 1),
    st.sampled_from([None, "start", "end"]),
    st.sampled_from(core.Priority),
    requirements,
)

logprobs = st.builds(
    core.TokenLogprob,
    uint32,
    f32(-50, 0),
    st.binary(max_size=3),
    st.lists(st.builds(core.Alternative, uint32, f32(-50, 0), st.binary(max_size=3)), max_size=2).map(tuple),
)
outcomes = st.builds(core.ChoiceOutcome, uint32, st.sampled_from(core.FinishReason), uint32, text)
stream_events = st.one_of(
    st.builds(core.Queued, uint32, st.none() | seconds),
    st.builds(core.Progress, st.sampled_from(core.Phase), uint64, uint64),
    st.builds(core.PromptScored, st.lists(logprobs, max_size=2).map(tuple)),
    st.builds(
        core.TokenDelta,
        uint32,
        uint32,
        token_ids,
        text,
        st.lists(logprobs, max_size=2).map(tuple),
        text,
        st.none() | st.builds(core.ToolCall, text, text, text),
    ),
    st.builds(
        core.Finished,
        st.lists(outcomes, max_size=2).map(tuple),
        st.builds(core.Usage, uint32, uint32, uint32),
        st.builds(core.Timings, seconds, seconds, seconds, seconds, seconds, st.floats(0, 1e9)),
    ),
)
starts = st.builds(core.Started, text, text, text, uint32, uint32, uint64, uint32)

artifacts = st.builds(
    records.Artifact,
    family=name,
    name=name,
    sha256=text,
    size_bytes=uint64,
    quantization=text,
    parameter_count=uint64,
    context_length=uint32,
    architecture=text,
    tier=st.sampled_from(records.Tier),
    tags=texts,
    license=text,
)
gpus = st.builds(
    records.Gpu,
    uint32,
    text,
    text,
    uint64,
    uint64,
    text,
    st.none() | st.floats(0, 1),
    st.none() | st.floats(-50, 150),
    st.none() | st.booleans(),
    st.booleans(),
    text,
)
loads = st.builds(
    records.Load,
    st.lists(
        st.builds(
            *(records.ModelLoad, name, uint32, uint32, uint32, uint64, uint64, st.floats(0, 1e6)),
            *(uint64, st.floats(0, 1e6), uint64),
        ),
        max_size=2,
    ).map(tuple),
    uint64,
    st.floats(0, 1),
    st.lists(gpus, max_size=1).map(tuple),
    st.none() | st.dictionaries(name, uint32, max_size=2),
)
model_statuses = st.builds(
    records.ModelStatus,
    artifacts,
    text,
    st.sampled_from(records.ModelState),
    st.frozensets(st.sampled_from(records.Feature), max_size=4),
    uint32,
    uint32,
    text,
    texts,
)
engines = st.builds(records.EngineInfo, text, text, st.sampled_from(records.EngineKind), texts, st.booleans())
cpus = st.builds(records.Cpu, text, uint32, uint32, texts)
machines = st.builds(
    records.Node, name, text, text, cpus, uint64, uint64, st.lists(gpus, max_size=1).map(tuple), labels
)


@st.composite
def runner_records(draw: st.DrawFn) -> records.RunnerRecord:
    """Records whose runner and node agree on the node's id, and whose load says nothing new of the node."""
    node = draw(machines)
    runner = records.Runner(
        runner_id=draw(name),
        incarnation=draw(st.integers(1, 2**64 - 1)),
        node_id=node.node_id,
        address=draw(name),
        server_name=draw(name),
        version=draw(text),
        engines=draw(st.lists(engines, max_size=1).map(tuple)),
        models=draw(st.lists(model_statuses, max_size=2).map(tuple)),
        labels=draw(labels),
    )
    record = records.RunnerRecord(runner, node, draw(st.sampled_from(records.RunnerState)), draw(loads), draw(uint64))
    return replace(record, node=record.machine)


leased = st.builds(fleet.LeasedRecord, runner_records(), st.integers(0, 9).map(float), st.none() | st.just(1.5))
removals = st.builds(fleet.Removal, text, uint64, st.sampled_from(fleet.RemovalReason))
directory_events = st.one_of(
    st.builds(fleet.SnapshotEvent, uint64, uint64, st.booleans(), st.lists(leased, max_size=2).map(tuple)),
    st.builds(
        fleet.DeltaEvent,
        uint64,
        uint64,
        st.booleans(),
        st.lists(leased, max_size=1).map(tuple),
        st.lists(removals, max_size=2).map(tuple),
    ),
    st.builds(fleet.BookmarkEvent, uint64, uint64, st.booleans()),
)
