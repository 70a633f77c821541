"""The prompts of an ensemble's parts, made from the caller's own request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from chorus.core.ensemble.records import Member
from chorus.core.errors import InvalidRequestError
from chorus.core.generation import (
    Conversation,
    GenerationRequest,
    Message,
    MessageRole,
    Prompt,
    Sampling,
    StopConditions,
    TextPart,
    TextPrompt,
    ToolChoice,
)

# Of a question that is sampled several times: without any chance all samples would be the same.
SAMPLED_TEMPERATURE = 0.8
_SPEAKS = {MessageRole.USER: "Question: ", MessageRole.ASSISTANT: "Answer: "}
_NEXT_QUESTION = ("\nQuestion:", "\n\n")
_MOST_STOP_STRINGS = 16
_SEEDS = 1 << 64  # as many as the wire has
# Of other models' texts that one is shown: some 1,500 tokens.
SHOWN_CHARACTERS = 6000


def question_of(prompt: Prompt) -> str:
    """The text of a prompt, as one shows it to somebody else; empty where it is token ids alone."""
    match prompt:
        case TextPrompt(text):
            return text
        case Conversation(messages):
            if len(messages) == 1:
                return _text_of(messages[0])
            return "\n\n".join(f"{message.role}: {_text_of(message)}" for message in messages)
        case _:
            return ""


def member_request(request: GenerationRequest, member: Member, *, with_logprobs: bool) -> GenerationRequest:
    """What a member is asked: the caller's request, to its model, after its instructions."""
    sampling = request.sampling
    temperature = sampling.temperature if member.temperature is None else member.temperature
    if member.draw and not temperature:
        temperature = SAMPLED_TEMPERATURE
    seed = None if sampling.seed is None else (sampling.seed + member.draw) % _SEEDS
    return replace(
        request,
        model=member.model,
        prompt=_instructed(request.prompt, member.instructions),
        sampling=replace(sampling, temperature=temperature, seed=seed),
        logprobs=0 if request.logprobs is None and with_logprobs else request.logprobs,
    )


def composing_request(request: GenerationRequest, model: str, task: str) -> GenerationRequest:
    """What an aggregator is asked: a single turn whose text is the answer, so that the caller's wishes for it hold."""
    return replace(
        request,
        model=model,
        prompt=Conversation((Message(MessageRole.USER, (TextPart(task),)),)),
        tools=(),
        tool_choice=ToolChoice.AUTO,
        prompt_logprobs=None,
        adapter="",
    )


def side_request(request: GenerationRequest, model: str, task: str, *, most_tokens: int | None) -> GenerationRequest:
    """What a judge or a reviewer is asked: the task as a single turn, without the caller's tools and forms, in the
    likeliest words. `most_tokens` None: as the caller allowed an answer."""
    return replace(
        composing_request(request, model, task),
        sampling=Sampling(temperature=0.0),
        stop=StopConditions(max_tokens=most_tokens if most_tokens is not None else request.stop.max_tokens),
        constraint=None,
        logprobs=None,
    )


def told_plainly(request: GenerationRequest) -> GenerationRequest:
    """A conversation as text that a model without a chat template goes on with; other prompts as they are.

    Such a model asks itself the next question once it has answered, so that it is stopped there.
    """
    if not isinstance(request.prompt, Conversation):
        return request
    lines = [f"{_SPEAKS.get(turn.role, '')}{_text_of(turn).strip()}" for turn in request.prompt.messages]
    if not request.prompt.continue_last:
        lines.append(_SPEAKS[MessageRole.ASSISTANT].rstrip())
    strings = tuple(dict.fromkeys((*request.stop.strings, *_NEXT_QUESTION)))
    return replace(
        request, prompt=TextPrompt("\n".join(lines)), stop=replace(request.stop, strings=strings[:_MOST_STOP_STRINGS])
    )


def shown(texts: Sequence[str], title: str) -> str:
    """Texts one below the other, numbered and anonymous; cut where together they would fill a small model's context."""
    most = SHOWN_CHARACTERS // max(1, len(texts))
    return "\n\n".join(f"{title} {number}:\n{clipped(text, most)}" for number, text in enumerate(texts, start=1))


def clipped(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """A text of at most so many characters, with a mark where it was cut."""
    text = text.strip()
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def _instructed(prompt: Prompt, instructions: str) -> Prompt:
    if not instructions:
        return prompt
    match prompt:
        case Conversation(messages):
            first = messages[0]
            if first.role is MessageRole.SYSTEM:  # many templates know one such turn alone, and only in front
                turn = replace(first, parts=(TextPart(f"{instructions}\n\n"), *first.parts))
                return replace(prompt, messages=(turn, *messages[1:]))
            turn = Message(MessageRole.SYSTEM, (TextPart(instructions),))
            return replace(prompt, messages=(turn, *messages))
        case TextPrompt(text):
            return TextPrompt(f"{instructions}\n\n{text}")
        case _:
            raise InvalidRequestError("token_ids", "leave no room for a member's instructions; send text")


def _text_of(message: Message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, TextPart))
