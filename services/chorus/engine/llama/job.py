"""One request inside the owner thread: its choices, what they have said, and the events that tell of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf

from chorus.core.batching import window
from chorus.core.batching.batch import Sequence
from chorus.core.batching.speculation import PromptLookup, Source
from chorus.core.fleet.records import Artifact
from chorus.core.generation import (
    Alternative,
    ChoiceOutcome,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PromptScored,
    Started,
    Timings,
    TokenDelta,
    TokenLogprob,
    ToolCall,
    ToolChoice,
    Usage,
)
from chorus.core.text.completion import Completion
from chorus.core.text.stops import StopStrings
from chorus.core.text.tool_calls import ToolCallReader
from chorus.engine.llama.binding import Adapter, Model
from chorus.engine.llama.constraint import Matcher
from chorus.engine.llama.context import FloatArray
from chorus.engine.llama.ranking import largest, log_normalizer
from chorus.engine.llama.sampling import Sampler
from chorus.engine.llama.stream import EventStream

_REPLAY_COST = 100  # of a delivered token, in those that are only copied


class Choice:
    """One answer. `tokens` is prompt and answer; `sequence` is how the scheduler knows it, None once it has ended.

    Where the oldest tokens may go, `tokens` is what is left of them.
    """

    def __init__(self, job: Job, number: int, delivered: SequenceOf[int], stops: StopStrings) -> None:
        request = job.request
        room = job.context_length - len(job.prompt)
        wanted = request.stop.max_tokens
        full = wanted is None or (wanted > room and not request.context_shift)
        self.job = job
        self.number = number
        self.tokens = [*job.prompt, *delivered]
        self.sampler = Sampler(
            request.sampling, seed=job.seed, choice=number, history=self.tokens, piece_of=job.model.written
        )
        self.matcher = job.matchers[number] if job.matchers else None  # it knows the delivered tokens
        if request.context_shift:
            self.tokens = window.replay(job.prompt, delivered, job.context_length)
        self.lookup: PromptLookup | None = None
        self.source: Source | None = None
        self.completion = Completion(
            limit=room if full or wanted is None else wanted,
            limit_reason=FinishReason.CONTEXT_FULL if full else FinishReason.LENGTH,
            stops=stops,
            stop_tokens=frozenset(request.stop.token_ids),
            end_tokens=job.end_tokens,
            ignore_eos=request.stop.ignore_eos,
        )
        uses_tools = bool(request.tools) and request.tool_choice is not ToolChoice.NONE
        self._tools = ToolCallReader() if uses_tools else None
        for token_id in delivered:
            if self.completion.reason is None:
                self._read(token_id)
        self.sequence: Sequence | None = None

    def take(self, token_id: int, logprobs: tuple[TokenLogprob, ...]) -> list[TokenDelta]:
        """The next token was drawn: returns what to deliver. `completion.reason` tells whether it was the last."""
        index = self.completion.count
        text, calls = self._read(token_id)
        self.tokens.append(token_id)
        self.sampler.accept(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)
        call = calls[0] if calls else None
        deltas = [TokenDelta(self.number, index, (token_id,), text, logprobs, "", call)]
        deltas += [TokenDelta(self.number, index + 1, (), "", (), "", more) for more in calls[1:]]
        return deltas

    def shift(self) -> int | None:
        """Lets the oldest tokens go if the context is full; returns how many at the beginning are as they were."""
        if len(self.tokens) < self.job.context_length:
            return None
        keep = window.kept_tokens(len(self.job.prompt), self.job.context_length)
        window.shift(self.tokens, keep)
        self.lookup = None
        return keep

    def outcome(self) -> ChoiceOutcome:
        """How it ended."""
        completion = self.completion
        assert completion.reason is not None
        return ChoiceOutcome(self.number, completion.reason, completion.count, completion.stop_string)

    def _read(self, token_id: int) -> tuple[str, list[ToolCall]]:
        completion = self.completion
        text = completion.accept(token_id, self.job.model.piece(token_id))
        tools = self._tools
        if tools is None:
            return text, []
        text, written = tools.feed(text)
        first = tools.count - len(written)
        calls = [
            ToolCall(self._call_id(first + place), call.name, call.arguments_json) for place, call in enumerate(written)
        ]
        if completion.reason is not None:
            text += tools.flush()
            if completion.reason is FinishReason.END and tools.count:
                completion.reason = FinishReason.TOOL_CALL
        return text, calls

    def _call_id(self, number: int) -> str:
        """The same after a resume, and unlikely to be any other's in the conversation."""
        key = f"{self.job.seed}:{self.number}:{number}:{len(self.job.prompt)}"
        return "call_" + hashlib.blake2b(key.encode(), digest_size=9).hexdigest()


class Job:
    """One request. Made in any thread, then touched by the owner thread alone, but for `stream`.

    Making one takes time that grows with what `making_size` says.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        model: Model,
        artifact: Artifact,
        prompt: list[int],
        seed: int,
        context_length: int,
        end_tokens: frozenset[int],
        arrived: float,
        load_s: float,
        adapter: Adapter | None = None,
        matchers: SequenceOf[Matcher] = (),
    ) -> None:
        """`arrived` is when the request came, on `time.monotonic`'s clock. Resumed ids must be in the vocabulary.

        `matchers`: one for each choice where the request has a constraint.
        """
        self.request = request
        self.model = model
        self.artifact = artifact
        self.prompt = prompt
        self.seed = seed
        self.context_length = context_length
        self.end_tokens = end_tokens
        self.lane = adapter
        self.matchers = matchers
        self.stream = EventStream()
        self.position: int | None = None
        self.started = False
        self.cached_tokens = 0
        self._arrived = arrived
        self._load_s = load_s
        self._admitted: float | None = None
        self._first: float | None = None
        self._drawn = 0
        self._scores: dict[int, TokenLogprob] = {}
        self._held: list[Event] = []
        stops = StopStrings(request.stop.strings)
        delivered = {choice.choice: choice.token_ids for choice in request.resume}
        self.choices = [
            Choice(self, number, delivered.get(number, ()), stops) for number in range(request.choice_count)
        ]
        for choice in self.choices:
            choice.sequence = self._sequence(choice)

    def _sequence(self, choice: Choice) -> Sequence | None:
        """What the scheduler is to run for a choice; None where nothing is left to compute."""
        scores = len(self.prompt) - 1 if choice.number == 0 and self.request.prompt_logprobs is not None else 0
        tokens = choice.tokens
        most = min(len(self.prompt) + choice.completion.limit, self.context_length)
        if choice.completion.reason is not None:
            if not scores:
                return None
            tokens = self.prompt[:scores]
            most = scores
        return Sequence(tokens, most, self, self.request.priority, self.lane, scores=scores)

    @property
    def sequences(self) -> list[Sequence]:
        """Those still to run or running."""
        return [choice.sequence for choice in self.choices if choice.sequence is not None]

    def admit(self, now: float) -> None:
        """Its first sequence has a slot."""
        if self._admitted is None:
            self._admitted = now

    def start(self, now: float) -> list[Event]:
        """The prompt has been read: the events that say so."""
        self.started = True
        # the least of its choices: what the others share with it was computed for this request
        self.cached_tokens = min(*(s.reused or 0 for s in self.sequences), len(self.prompt), len(self.prompt))
        self._first = now
        events: list[Event] = [
            Started(
                self.artifact.family,
                self.artifact.name,
                self.artifact.sha256,
                len(self.prompt),
                self.cached_tokens,
                self.seed,
                self.context_length,
            )
        ]
        if self.request.prompt_logprobs is not None:
            first = TokenLogprob(self.prompt[0], 0.0, self.model.piece_of(self.prompt[0], show_special=True))
            events.append(PromptScored((first, *(self._scores[place] for place in range(len(self.prompt) - 1)))))
        held, self._held = self._held, []
        return events + held

    @property
    def scored(self) -> bool:
        """Whether all of the prompt has been scored that is to be."""
        return self.request.prompt_logprobs is None or len(self._scores) == len(self.prompt) - 1

    @property
    def holds(self) -> bool:
        """Whether something waits to be told after `start`'s events."""
        return bool(self._held)

    def hold(self, event: Event) -> None:
        """Keeps what must come after `start`'s events until these are told."""
        self._held.append(event)

    def drew(self) -> None:
        """One more token was drawn."""
        self._drawn += 1

    def score(self, row: FloatArray, position: int) -> None:
        """Takes the logits at a position of the prompt, which score the token after it; again after a preemption."""
        assert self.request.prompt_logprobs is not None
        self._scores[position] = self.logprob(row, self.prompt[position + 1], self.request.prompt_logprobs)

    def logprob(self, row: FloatArray, token_id: int, alternatives: int) -> TokenLogprob:
        """A token's log-probability with so many of the likeliest tokens beside it, from logits nothing has changed."""
        normalizer = log_normalizer(row)
        written = self.model.written
        ids, values = largest(row, alternatives)
        return TokenLogprob(
            token_id,
            float(row[token_id]) - normalizer,
            written(token_id),
            tuple(
                Alternative(other, value - normalizer, written(other))
                for other, value in zip(ids.tolist(), values.tolist(), strict=True)
            ),
        )

    def finish(self, now: float) -> Finished:
        """The end, when every choice has ended."""
        admitted = now if self._admitted is None else self._admitted
        first = now if self._first is None else self._first
        decode_s = now - first
        outcomes = tuple(choice.outcome() for choice in self.choices)
        return Finished(
            outcomes,
            Usage(len(self.prompt), self.cached_tokens, sum(outcome.token_count for outcome in outcomes)),
            Timings(
                queue_s=max(admitted - self._arrived - self._load_s, 0.0),
                load_s=self._load_s,
                prefill_s=max(first - admitted, 0.0),
                time_to_first_token_s=first - self._arrived,
                decode_s=decode_s,
                tokens_per_second=(self._drawn - 1) / decode_s if decode_s > 0 and self._drawn > 1 else 0.0,
            ),
        )


def making_size(request: GenerationRequest, prompt_tokens: int) -> int:
    """About how many tokens are copied for a request's job: those that are read again, one by one, count for more."""
    replayed = sum(len(choice.token_ids) for choice in request.resume)
    return request.choice_count * prompt_tokens + _REPLAY_COST * replayed
