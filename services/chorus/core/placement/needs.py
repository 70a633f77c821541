"""What a request needs of a runner, derived from the request alone: everything that placement filters by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from chorus.core.fleet.records import Feature, Tier
from chorus.core.generation import (
    Conversation,
    DeliveredChoice,
    EmbeddingRequest,
    GenerationRequest,
    ImagePart,
    Priority,
    Prompt,
    Requirements,
    RerankRequest,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolCall,
)

# The longest token of the vocabularies that we know stands for 128 characters (of blanks). A text's length divided by
# this is never more than its number of tokens, so nothing is refused that would have fitted.
MAX_CHARACTERS_PER_TOKEN = 128
# What a token of ordinary text stands for; a guess that only ever makes one runner dearer than another.
LIKELY_CHARACTERS_PER_TOKEN = 4
# What a chat template puts around a message or a tool, and what a picture is at large providers, at most.
_TEMPLATE_TOKENS = 32
_PICTURE_TOKENS = 2048


class Work(StrEnum):
    """What a runner is asked to do."""

    GENERATE = "generate"
    EMBED = "embed"
    RERANK = "rerank"
    COUNT_TOKENS = "count_tokens"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a runner must offer to serve a request.

    `model` is a family or an artifact's name; empty: any model that has the rest. `context_length`, in tokens, is what
    a runner must have for certain; `likely_context_length` is a guess of it, at least as great, for ranking alone.
    `adapter` is the name of a LoRA adapter, which chooses the model where none is named.
    `prompt_tokens` is the least that the prompt can have, or what it has where that is known (`prompt_is_counted`).
    `allow_external` says whether an engine of a paid provider may be asked.

    `most_prompt_tokens` is the most that there can be to read, by which a paid provider's price is reckoned.

    For ranking alone, too: `likely_prompt_tokens`, about how much there is to read; `answer_tokens`, the most that is
    to be generated, for all choices together (0: no bound is known); `background`, whether others come first.
    """

    work: Work = Work.GENERATE
    model: str = ""
    features: frozenset[Feature] = frozenset()
    adapter: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    tier: Tier | None = None
    tags: frozenset[str] = frozenset()
    context_length: int = 0
    likely_context_length: int = 0
    prompt_tokens: int = 0
    prompt_is_counted: bool = False
    artifact_sha256: str = ""
    runner_ids: frozenset[str] = frozenset()
    node_ids: frozenset[str] = frozenset()
    private: bool = False
    allow_external: bool = True
    likely_prompt_tokens: int = 0
    answer_tokens: int = 0
    most_prompt_tokens: int = 0
    background: bool = False

    @classmethod
    def of_generation(cls, request: GenerationRequest, *, allow_external: bool = False) -> Needs:
        """What a generation needs."""
        # The engine replays what was delivered; with context shift the oldest of it may be gone.
        delivered = max((len(choice.token_ids) for choice in request.resume), default=0)
        delivered = 0 if request.context_shift else delivered
        least, likely = _prompt_tokens(request.prompt, request.tools, request.resume)
        # One token more than the prompt, or there is nothing to generate.
        needs = cls._of(
            Work.GENERATE,
            request.model,
            request.needed_features(),
            request.requirements,
            least=least + delivered + 1,
            likely=likely + delivered + (request.stop.max_tokens or 0) + 1,
            prompt_tokens=least,
            counted=isinstance(request.prompt, TokenPrompt),
            allow_external=allow_external,
            adapter=request.adapter,
        )
        return replace(
            needs,
            # Who goes on with an answer names the file that began it, wherever that was.
            allow_external=allow_external if request.resume else needs.allow_external,
            likely_prompt_tokens=likely + delivered,
            answer_tokens=(request.stop.max_tokens or 0) * request.choice_count,
            most_prompt_tokens=_most_prompt_tokens(request) + delivered,
            background=request.priority is Priority.BACKGROUND,
        )

    @classmethod
    def of_embedding(cls, request: EmbeddingRequest, *, allow_external: bool = False) -> Needs:
        """What an embedding needs; a text that may be cut needs no context."""
        sizes = [_text_tokens(text) for text in request.inputs]
        least = max((low for low, _ in sizes), default=0) if request.truncate is None else 0
        likely = max((high for _, high in sizes), default=0) if request.truncate is None else 0
        return cls._of(
            Work.EMBED,
            request.model,
            frozenset({Feature.EMBED}),
            request.requirements,
            least=least,
            likely=likely,
            prompt_tokens=least,
            counted=all(isinstance(text, tuple) for text in request.inputs),
            allow_external=allow_external,
            most=sum(map(_most_tokens, request.inputs)),
        )

    @classmethod
    def of_rerank(cls, request: RerankRequest, *, allow_external: bool = False) -> Needs:
        """What reranking needs; documents that may be cut need no context, but the query does."""
        documents = request.documents if request.truncate is None else ()
        sizes = [_text_tokens(document) for document in documents]
        least, likely = _text_tokens(request.query)
        least += max((low for low, _ in sizes), default=0)
        likely += max((high for _, high in sizes), default=0)
        return cls._of(
            Work.RERANK,
            request.model,
            frozenset({Feature.RERANK}),
            request.requirements,
            least=least,
            likely=likely,
            prompt_tokens=least,
            counted=False,
            allow_external=allow_external,
            most=sum(_most_tokens(request.query) + _most_tokens(document) for document in request.documents),
        )

    @classmethod
    def of_token_count(cls, request: GenerationRequest, *, allow_external: bool = False) -> Needs:
        """What counting a prompt's tokens needs: its template and tokenizer, however long it is."""
        requirements = request.requirements
        asked = GenerationRequest(
            model=request.model, prompt=request.prompt, tools=request.tools, tool_choice=request.tool_choice
        )
        return cls._of(
            Work.COUNT_TOKENS,
            request.model,
            asked.needed_features() | {Feature.TOKENIZE},
            replace(requirements, context_length=0) if requirements.context_length else requirements,
            least=0,
            likely=0,
            prompt_tokens=0,
            counted=False,
            allow_external=allow_external,
        )

    @classmethod
    def _of(
        cls,
        work: Work,
        model: str,
        features: frozenset[Feature],
        requirements: Requirements,
        *,
        least: int,
        likely: int,
        prompt_tokens: int,
        counted: bool,
        allow_external: bool,
        adapter: str = "",
        most: int = 0,
    ) -> Needs:
        least = max(least, requirements.context_length)
        return cls(
            work=work,
            model=model,
            features=features,
            adapter=adapter,
            labels=requirements.labels,
            tier=requirements.tier,
            tags=frozenset(requirements.tags),
            context_length=least,
            likely_context_length=max(least, likely),
            prompt_tokens=prompt_tokens,
            prompt_is_counted=counted,
            artifact_sha256=requirements.artifact_sha256,
            runner_ids=frozenset(requirements.runner_ids),
            node_ids=frozenset(requirements.node_ids),
            private=requirements.private,
            most_prompt_tokens=most,
            # Who names a model means it, wherever it runs; who names none must not be surprised by a bill.
            allow_external=allow_external or bool(model),
        )

    @property
    def wants_any_model(self) -> bool:
        """Whether tier, tags or adapter choose the model, so that the mesh's default model has no say."""
        chosen = self.tier is not None or self.tags or self.artifact_sha256 or self.adapter
        return not self.model and bool(chosen)

    def with_model(self, model: str) -> Needs:
        """The same for the model that stands in for none; that it was not named stays known."""
        return replace(self, model=model)

    def with_context(self, context_length: int) -> Needs:
        """The same, knowing that at least `context_length` tokens of context are needed."""
        return replace(
            self,
            context_length=max(self.context_length, context_length),
            likely_context_length=max(self.likely_context_length, context_length),
        )


def _prompt_tokens(prompt: Prompt, tools: Sequence[Tool], resume: Sequence[DeliveredChoice]) -> tuple[int, int]:
    """The least and the likely number of tokens of a prompt. Pictures, templates and tools only add to the first."""
    if isinstance(prompt, TokenPrompt):
        return len(prompt.token_ids), len(prompt.token_ids)
    if isinstance(prompt, TextPrompt):
        return _text_tokens(prompt.text)
    characters = _conversation_characters(prompt)
    described = sum(len(tool.name) + len(tool.description) for tool in tools)
    resumed = max((len(choice.text) for choice in resume), default=0)
    return characters // MAX_CHARACTERS_PER_TOKEN, (characters + described + resumed) // LIKELY_CHARACTERS_PER_TOKEN


def _most_prompt_tokens(request: GenerationRequest) -> int:
    """The most tokens that a prompt can have, as a provider counts them: no tokenizer makes more of a text than it has
    bytes. What templates and pictures add is a guess on the safe side."""
    prompt = request.prompt
    if isinstance(prompt, TokenPrompt):
        return len(prompt.token_ids)
    resumed = sum(_bytes(choice.text) for choice in request.resume)
    if isinstance(prompt, TextPrompt):
        return _bytes(prompt.text) + resumed
    tools = sum(
        _bytes(tool.name) + _bytes(tool.description) + len(json.dumps(tool.parameters)) + _TEMPLATE_TOKENS
        for tool in request.tools
    )
    form = _bytes(request.constraint.source) if request.constraint is not None else 0
    total = tools + form + resumed
    for message in prompt.messages:
        total += _TEMPLATE_TOKENS
        for part in message.parts:
            if isinstance(part, ToolCall):
                total += _bytes(part.name) + _bytes(part.arguments_json)
            else:
                total += _PICTURE_TOKENS if isinstance(part, ImagePart) else _bytes(part.text)
    return total


def _most_tokens(text: str | tuple[int, ...]) -> int:
    return len(text) if isinstance(text, tuple) else _bytes(text)


def _bytes(text: str) -> int:
    # Most texts are ASCII, which Python knows of each at once.
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _text_tokens(text: str | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(text, tuple):
        return len(text), len(text)
    return len(text) // MAX_CHARACTERS_PER_TOKEN, len(text) // LIKELY_CHARACTERS_PER_TOKEN


def _conversation_characters(conversation: Conversation) -> int:
    total = 0
    for message in conversation.messages:
        for part in message.parts:
            if isinstance(part, ToolCall):
                total += len(part.arguments_json)
            elif not isinstance(part, ImagePart):
                total += len(part.text)
    return total
