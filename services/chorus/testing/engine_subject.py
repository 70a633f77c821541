"""An engine under test, and what checks of it need: asking, hearing a whole stream, and checking its order."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from chorus.core.errors import (
    ChorusError,
)
from chorus.core.fleet.records import Feature, ModelStatus
from chorus.core.generation import (
    Event,
    Finished,
    GenerationRequest,
    Progress,
    Prompt,
    PromptScored,
    Queued,
    Sampling,
    Started,
    StopConditions,
    TokenDelta,
    TokenLogprob,
)
from chorus.engine.base import Engine

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Subject:
    """An engine under test. `prompt` must draw an answer of 24 tokens or more where the end of text is ignored.

    The engine has few enough slots and places in its queue that a check can fill them. `exact`: a token depends on
    prompt and index alone, and not on what else is in the batch. `forget` makes an engine forget what it has read:
    sums over what is cached may be rounded otherwise, and two tokens that were nearly as likely then change places.
    """

    engine: Engine
    model: str
    prompt: Prompt
    slots: int
    max_queue: int
    exact: bool
    forget: Callable[[], Awaitable[None]] | None = None


@dataclass
class Heard:
    """One whole stream."""

    events: list[Event] = field(default_factory=list)

    @property
    def deltas(self) -> list[TokenDelta]:
        return [event for event in self.events if isinstance(event, TokenDelta)]

    @property
    def started(self) -> Started:
        return next(event for event in self.events if isinstance(event, Started))

    @property
    def finished(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished), f"the stream ended with {last}"
        return last

    def ids(self, choice: int = 0) -> list[int]:
        return [token_id for delta in self.deltas if delta.choice == choice for token_id in delta.token_ids]

    def text(self, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas if delta.choice == choice)

    def logprobs(self) -> list[TokenLogprob]:
        return [logprob for delta in self.deltas for logprob in delta.logprobs]


async def hear(engine: Engine, request: GenerationRequest) -> Heard:
    """Reads a stream to its end and checks its order."""
    heard = Heard()
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            heard.events.append(event)
    check_order(heard, request)
    return heard


async def hear_anew(subject: Subject, request: GenerationRequest) -> Heard:
    """Reads a stream whose prompt nothing was known of: such a one is computed the same way each time."""
    if subject.forget is not None:
        await subject.forget()
    return await hear(subject.engine, request)


def check_order(heard: Heard, request: GenerationRequest) -> None:
    """Raises `AssertionError` unless the events came as inference.v1's GenerationEvent says."""
    kinds = [type(event) for event in heard.events]
    assert kinds.count(Started) == 1
    start = kinds.index(Started)
    assert all(kind in (Queued, Progress) for kind in kinds[:start])
    rest = heard.events[start + 1 : -1]
    if request.prompt_logprobs is not None:
        assert isinstance(rest.pop(0), PromptScored)
    assert all(isinstance(event, TokenDelta) for event in rest)
    indexes = dict.fromkeys(range(request.choice_count), 0)
    for delivered in request.resume:
        indexes[delivered.choice] = delivered.tokens
    dealt_in_text = not any(delta.token_ids for delta in heard.deltas)
    for delta in heard.deltas:
        assert delta.index == indexes[delta.choice], "an index was left out or came twice"
        indexes[delta.choice] += 1 if dealt_in_text else len(delta.token_ids)
        delta.text.encode()  # never half a surrogate pair
        assert not delta.logprobs or len(delta.logprobs) == len(delta.token_ids)
    outcomes = heard.finished.choices
    assert [outcome.choice for outcome in outcomes] == list(range(request.choice_count))
    spoke = {delta.choice for delta in heard.deltas}
    for outcome in outcomes:  # what was delivered past a choice's end does not count
        delivered_enough = outcome.choice not in spoke and outcome.token_count <= indexes[outcome.choice]
        # Where tokens have no ids, indexes count deltas, and a server tells the tokens themselves.
        assert outcome.token_count == indexes[outcome.choice] or delivered_enough or dealt_in_text
    told_late = dealt_in_text and heard.started.prompt_tokens == 0
    assert heard.finished.usage.prompt_tokens == heard.started.prompt_tokens or told_late
    assert heard.finished.usage.prompt_tokens > 0
    assert heard.finished.usage.completion_tokens == sum(outcome.token_count for outcome in outcomes)


def ask(subject: Subject, tokens: int = 12, sampling: Sampling = GREEDY, **changes: object) -> GenerationRequest:
    """A request for so many tokens of the subject's answer, or fewer where the engine can't go on after its end."""
    ignore_eos = Feature.IGNORE_EOS in status_of(subject).features
    request = GenerationRequest(
        subject.model, subject.prompt, sampling=sampling, stop=StopConditions(max_tokens=tokens, ignore_eos=ignore_eos)
    )
    return replace(request, **changes)  # type: ignore[arg-type]


def status_of(subject: Subject) -> ModelStatus:
    """The subject's model as it stands now."""
    return next(
        status for status in subject.engine.models() if subject.model in (status.artifact.name, status.artifact.family)
    )


async def expect(error: type[ChorusError], call: Awaitable[object]) -> ChorusError:
    """Awaits a call that must raise that error, and returns it."""
    try:
        await call
    except error as caught:
        return caught
    raise AssertionError(f"{error.__name__} was expected")


async def assert_idle(subject: Subject) -> None:
    """Every slot is free: a whole request goes through without waiting, and then nothing is in use."""
    heard = await hear(subject.engine, ask(subject, 1))
    assert not any(isinstance(event, Queued) for event in heard.events)
    report = next(load for load in subject.engine.load_report() if load.model == status_of(subject).artifact.name)
    assert (report.slots_used, report.queued, report.kv_used_tokens) == (0, 0, 0)
    assert report.slots_total == subject.slots


async def rest_of(stream: AsyncGenerator[Event, None]) -> Heard:
    """Reads a stream to its end from wherever it stands."""
    async with aclosing(stream):
        return Heard([event async for event in stream])
