"""Which requests may have an answer from the cache, and what makes two requests one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from chorus.core.cache.gate import MAX_QUESTION
from chorus.core.generation import Conversation, Fallback, GenerationRequest, MessageRole, Priority, TextPart


class CacheMode(StrEnum):
    """How earlier answers are used."""

    OFF = "off"
    EXACT = "exact"
    SEMANTIC = "semantic"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the cache may do for a request; `reason` says, for people, why it is less than was asked for.

    `asks_store`: the store may be told what is asked, be it for an old answer where nobody can give one.
    """

    mode: CacheMode
    reason: str = ""
    asks_store: bool = True


@dataclass(frozen=True, slots=True)
class Permission:
    """Who may see a request, and be paid for it: requests are run as one only where they allow the same.

    An answer that was kept is given whatever its request allowed: nobody is asked then, and it is the same caller's.
    """

    private: bool = False
    names_model: bool = False
    external: bool = False
    similar_model: bool = False

    @classmethod
    def of(cls, request: GenerationRequest, fallback: Fallback) -> Permission:
        """That of a request."""
        return cls(request.requirements.private, bool(request.model), fallback.external, fallback.similar_model)


def plan(request: GenerationRequest, asked: CacheMode | None, default: CacheMode, *, on_network: bool = False) -> Plan:
    """What the cache may do. `asked` None: the request says nothing, and `default` counts if it is deterministic.

    `on_network`: answers are kept by a server that coordinators share, where nothing of a private request may go.
    """
    mode = default if asked is None else asked
    if on_network and request.requirements.private:
        return Plan(CacheMode.OFF, "it is private, and answers are kept by a server on the network", asks_store=False)
    if mode is CacheMode.OFF:
        return Plan(CacheMode.OFF)
    if request.resume:
        return Plan(CacheMode.OFF, "it goes on with an interrupted answer")
    if any(tool.acts for tool in request.tools):
        return Plan(CacheMode.OFF, "it has tools that act")
    if request.adapter:
        return Plan(CacheMode.OFF, "its adapter is known by name alone, and may be another file by now")
    if asked is None and not is_deterministic(request):
        return Plan(CacheMode.OFF)
    if mode is CacheMode.SEMANTIC and request.prompt_logprobs is not None:
        return Plan(CacheMode.EXACT, "another question's prompt has other log-probabilities")
    if mode is CacheMode.SEMANTIC and question_of(request) is None:
        return Plan(CacheMode.EXACT, f"only a question in words, of at most {MAX_QUESTION} characters, is compared")
    return Plan(mode)


def is_deterministic(request: GenerationRequest) -> bool:
    """Whether the same request draws the same tokens: nothing is drawn, or with a given seed."""
    return request.sampling.temperature == 0.0 or request.sampling.seed is not None


def normalised(request: GenerationRequest) -> GenerationRequest:
    """The request without what does not change its answer: urgency, session, privacy (callers share nothing)."""
    return replace(
        request,
        priority=Priority.INTERACTIVE,
        session_id="",
        requirements=replace(request.requirements, private=False),
    )


def question_of(request: GenerationRequest) -> str | None:
    """The question that a conversation ends with, where it is words alone and short enough for the gate."""
    prompt = request.prompt
    if not isinstance(prompt, Conversation) or not prompt.messages or prompt.continue_last:
        return None
    last = prompt.messages[-1]
    if last.role is not MessageRole.USER or len(last.parts) != 1 or not isinstance(last.parts[0], TextPart):
        return None
    text = last.parts[0].text.strip()
    return text if 0 < len(text) <= MAX_QUESTION else None


def without_question(request: GenerationRequest) -> GenerationRequest:
    """All of a request but its question: only where that is equal are two questions compared at all."""
    prompt = request.prompt
    assert isinstance(prompt, Conversation), "question_of() comes first"
    last = replace(prompt.messages[-1], parts=(TextPart(""),))
    return replace(request, prompt=replace(prompt, messages=(*prompt.messages[:-1], last)))
