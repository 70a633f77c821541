"""What a caller has got of one generation, over all of its attempts: what another runner goes on from.

Every token that reaches the caller passes `take`, which knows what comes next of each choice. So whatever a runner
sends, no index is delivered twice and none is left out: what was delivered before is dropped, and a runner that leaves
something out, or contradicts what was delivered, has failed.

An engine that streams text without token ids counts pieces of text instead of tokens, and after a resume begins to
count anew; its indexes are shifted so that they rise on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from chorus.core.errors import EngineError
from chorus.core.generation import DeliveredChoice, GenerationRequest


@dataclass(slots=True)
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    next: int | None = 0  # the index that comes next; None where only the engine knows
    shift: int | None = 0  # what is added to the engine's indexes; None until it has sent one


class Delivered:
    """The record of one generation with `choice_count` choices.

    `resume` is what the caller had before it asked us, and `allow_text` whether it lets an engine without token ids go
    on from text. `has_form`: the text has to have one, as of a JSON Schema. Token counts are over all choices, without
    what the caller had before.
    """

    def __init__(
        self,
        choice_count: int = 1,
        resume: Sequence[DeliveredChoice] = (),
        *,
        allow_text: bool = False,
        has_form: bool = False,
    ) -> None:
        self._choice_count = choice_count
        self._allow_text = allow_text
        self._has_form = has_form
        self._choices = {given.choice: _given(given) for given in resume}
        self._with_ids = True
        self._resumes_from_ids = True
        self._more_than_text = False
        self.started = False
        """Whether part of the answer was sent, so that another runner may not begin anew."""
        self.finished = False
        self.output_tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.first_at: float | None = None
        self.last_at: float | None = None

    def begin(self, *, with_ids: bool, can_resume: bool) -> None:
        """An attempt begins, on a model that tells token ids or not, and can go on from them or not."""
        if not self.started:
            self._with_ids, self._resumes_from_ids = with_ids, with_ids and can_resume
        for choice in self._choices.values():
            choice.shift = 0 if self._with_ids else None

    @property
    def obstacle(self) -> str:
        """Why no other runner can go on with it; empty where one can."""
        if self._resumes_from_ids:
            return ""
        if self._with_ids:
            return "the engine that began it cannot go on from token ids"
        if not self._allow_text:
            return "the engine that began it streams text without token ids (resume.allow_text lets another go on)"
        if self._more_than_text or self._choice_count > 1:
            return "only plain text of a single choice can go on without token ids"
        if self._has_form:  # the next engine would begin it anew
            return "text that must have a form (grammar, json_schema, regex) cannot go on without token ids"
        return ""

    @classmethod
    def of(cls, request: GenerationRequest) -> Delivered:
        """That of a request, at its beginning."""
        return cls(
            request.choice_count,
            request.resume,
            allow_text=request.allow_text_resume,
            has_form=request.constraint is not None,
        )

    @property
    def from_text(self) -> bool:
        """Whether it would go on from text, so that a token may come out differently."""
        return not self._with_ids

    def choices(self) -> tuple[DeliveredChoice, ...]:
        """Every choice of which something was delivered, in order, what the caller had before included."""
        return tuple(
            _told(number, choice, self._with_ids)
            for number, choice in sorted(self._choices.items())
            if choice.token_ids or choice.text
        )

    @property
    def token_total(self) -> int:
        """How many tokens all choices have, with those that the caller had before, as far as he has counted them."""
        return sum(choice.next or 0 for choice in self._choices.values())

    def take(
        self, number: int, index: int, token_ids: Sequence[int], text: str = "", *, more: bool = False, now: float = 0.0
    ) -> int | None:
        """Takes a delta; returns the index under which to deliver it, or None where all of it was delivered before.

        `text` counts where there are no token ids. `more`: it holds reasoning or a tool call. Raises EngineError where
        it leaves something out or contradicts.
        """
        if not 0 <= number < self._choice_count:
            raise EngineError(f"the runner sent choice {number} of {self._choice_count}")
        choice = self._choices.get(number)
        if choice is None:
            choice = self._choices[number] = _Choice()
        if choice.next is None:  # the caller gave text alone: what the engine begins with is right
            choice.next, choice.shift = index, 0
        if choice.shift is None:
            choice.shift = choice.next - index
        index += choice.shift
        # Beside token ids, a message without any adds to the last token (a second tool call) and has no index.
        given = len(token_ids)
        count = given or (0 if self._with_ids else 1)
        if index != choice.next:
            _check_again(choice, number, index, token_ids, count)
            return None
        choice.next += count
        choice.token_ids.extend(token_ids)
        if not given and not self._with_ids:
            choice.text.append(text)
            self._more_than_text = self._more_than_text or more
        self.started = True
        self.output_tokens += given or 1
        if self.first_at is None:
            self.first_at = now
        self.last_at = now
        return index

    def token_count(self, number: int, reported: int) -> int:
        """How many tokens a choice has, if its runner says `reported`. Raises EngineError where some are missing."""
        choice = self._choices.get(number, _NOTHING)
        came = choice.next or 0
        if self._with_ids:
            if reported != came:
                raise EngineError(f"the runner says that choice {number} has {reported} tokens, and {came} came")
            return reported
        # An engine that began to count anew does not know of what came before it.
        return max(reported, came) if choice.shift is None else reported + choice.shift


def _check_again(choice: _Choice, number: int, index: int, token_ids: Sequence[int], count: int) -> None:
    """Returns where a delta that is out of order is nothing but what was delivered before."""
    assert choice.next is not None, "it was set by the choice's first delta"
    if index + count > choice.next:
        raise EngineError(f"the runner sent token {index} of choice {number}, where {choice.next} comes next")
    if list(token_ids) != choice.token_ids[index : index + len(token_ids)]:
        raise EngineError(f"the runner sent another token {index} of choice {number} than was delivered before")


_NOTHING = _Choice()


def _given(choice: DeliveredChoice) -> _Choice:
    text = [choice.text] if choice.text else []
    return _Choice(list(choice.token_ids), text, next=choice.tokens or (None if text else 0))


def _told(number: int, choice: _Choice, with_ids: bool) -> DeliveredChoice:
    if choice.token_ids and (with_ids or not choice.text):  # a caller may have given both
        return DeliveredChoice(number, tuple(choice.token_ids))
    text = "".join(choice.text)
    # Tokens whose text was still held back are generated anew, so they are none of this text.
    return DeliveredChoice(number, (), text, min(choice.next or 0, len(text.encode())))
