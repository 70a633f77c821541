"""One answer of the fake engine: which token comes at which index, and the events around them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

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
    Usage,
)
from chorus.core.text.completion import Completion
from chorus.core.text.stops import StopStrings
from chorus.testing import fake_vocabulary as vocabulary

_ECHO = b"echo:"
_END_TOKENS = frozenset((vocabulary.END,))


class FakeAnswer:
    """The choices of one request. Token ids are a pure function of (prompt, choice, index)."""

    def __init__(
        self,
        artifact: Artifact,
        request: GenerationRequest,
        prompt: list[int],
        context_length: int,
        answer_tokens: int,
        *,
        with_ids: bool,
    ) -> None:
        """Replays what was delivered. `answer_tokens` come before the end of text."""
        self._artifact = artifact
        self._request = request
        self._prompt = prompt
        self._context_length = context_length
        self._with_ids = with_ids
        self._first_at: float | None = None
        text = b"".join(map(vocabulary.piece_of, prompt))
        line = text.rpartition(b"\n")[2]
        echo = line.partition(_ECHO)[2] if _ECHO in line else None
        self._scripts = [
            _echo(echo) if echo is not None else _positions(vocabulary.answer_tag(text, choice), answer_tokens)
            for choice in range(request.choice_count)
        ]
        room = context_length - len(prompt)
        wanted = request.stop.max_tokens
        full = wanted is None or wanted > room
        stops = StopStrings(request.stop.strings)
        self._completions = [
            Completion(
                limit=room if full or wanted is None else wanted,
                limit_reason=FinishReason.CONTEXT_FULL if full else FinishReason.LENGTH,
                stops=stops,
                stop_tokens=frozenset(request.stop.token_ids),
                end_tokens=_END_TOKENS,
                ignore_eos=request.stop.ignore_eos,
            )
            for _ in range(request.choice_count)
        ]
        self._replay()
        self._generated = 0

    @property
    def unfinished(self) -> list[int]:
        """The choices that go on."""
        return [choice for choice, completion in enumerate(self._completions) if completion.reason is None]

    def next_step(self) -> int | None:
        """The lowest index that comes next, or None when every choice has ended."""
        return min((self._completions[choice].count for choice in self.unfinished), default=None)

    def start(self) -> list[Event]:
        """What comes before the first token."""
        events: list[Event] = [
            Started(
                model=self._artifact.family,
                artifact=self._artifact.name,
                artifact_sha256=self._artifact.sha256,
                prompt_tokens=len(self._prompt),
                cached_tokens=0,
                seed=self._request.sampling.seed or 0,
                context_length=self._context_length,
            )
        ]
        if self._request.prompt_logprobs is not None:
            scored = [_score(token_id, self._request.prompt_logprobs) for token_id in self._prompt]
            scored[0] = TokenLogprob(self._prompt[0], 0.0, vocabulary.piece_of(self._prompt[0]))
            events.append(PromptScored(tuple(scored)))
        return events

    def token(self, choice: int) -> TokenDelta:
        """The next token of a choice that goes on."""
        completion = self._completions[choice]
        index = completion.count
        token_id = self._scripts[choice](index)
        if token_id == vocabulary.END and self._request.stop.ignore_eos:
            token_id = vocabulary.position_token(0, index)
        text = completion.accept(token_id, vocabulary.piece_of(token_id))
        if self._first_at is None:
            self._first_at = asyncio.get_running_loop().time()
        self._generated += 1
        logprobs = () if self._request.logprobs is None else (_score(token_id, self._request.logprobs),)
        return TokenDelta(choice, index, (token_id,) if self._with_ids else (), text, logprobs)

    def finish(self, arrived: float) -> Finished:
        """The end. `arrived` is the event loop's time at which the request came."""
        now = asyncio.get_running_loop().time()
        first_at = now if self._first_at is None else self._first_at
        decode_s = now - first_at
        outcomes = tuple(
            ChoiceOutcome(choice, completion.reason or FinishReason.END, completion.count, completion.stop_string)
            for choice, completion in enumerate(self._completions)
        )
        return Finished(
            outcomes,
            Usage(len(self._prompt), 0, sum(outcome.token_count for outcome in outcomes)),
            Timings(
                time_to_first_token_s=first_at - arrived,
                decode_s=decode_s,
                tokens_per_second=self._generated / decode_s if decode_s > 0 else 0.0,
            ),
        )

    def _replay(self) -> None:
        for delivered in self._request.resume:
            completion = self._completions[delivered.choice]
            if delivered.token_ids or not delivered.text:
                for token_id in delivered.token_ids:
                    if completion.reason is None:
                        completion.accept(token_id, vocabulary.piece_of(token_id))
                continue
            text = ""
            while text != delivered.text and completion.reason is None:
                token_id = self._scripts[delivered.choice](completion.count)
                text += completion.accept(token_id, vocabulary.piece_of(token_id))


def _echo(text: bytes) -> Callable[[int], int]:
    return lambda index: text[index] if index < len(text) else vocabulary.END


def _positions(tag: int, answer_tokens: int) -> Callable[[int], int]:
    return lambda index: vocabulary.position_token(tag, index) if index < answer_tokens else vocabulary.END


def _score(token_id: int, alternatives: int) -> TokenLogprob:
    """As if the token had half of all probability, the next one a quarter, and so on."""
    piece = vocabulary.piece_of(token_id)
    listed = [Alternative(token_id, math.log(0.5), piece)]
    listed += [
        Alternative(other, (rank + 2) * math.log(0.5), vocabulary.piece_of(other))
        for rank, other in enumerate(other for other in range(alternatives) if other != token_id)
    ]
    return TokenLogprob(token_id, math.log(0.5), piece, tuple(listed[:alternatives]))
