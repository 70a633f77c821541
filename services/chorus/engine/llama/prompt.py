"""From a prompt to token ids: the model's template and its tokenizer, and the facts about both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chorus.core.errors import InvalidRequestError, ModelFileError
from chorus.core.fleet.records import Feature
from chorus.core.generation import (
    Conversation,
    ImagePart,
    Part,
    Prompt,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolCall,
)
from chorus.engine.llama import constraint
from chorus.engine.llama.binding import Model
from chorus.engine.llama.template import ChatTemplate

_ALWAYS = {Feature.TOKENIZE}
_MESSAGE_SIZE = 500  # what a message costs a template besides its text, in characters
_GENERATING = {
    Feature.TOKEN_INPUT,
    Feature.TOKEN_IDS,
    Feature.RESUME,
    Feature.MULTIPLE_CHOICES,
    Feature.LOGPROBS,
    Feature.PROMPT_LOGPROBS,
    Feature.LOGIT_BIAS,
    Feature.PENALTIES,
    Feature.TYPICAL,
    Feature.SEED,
    Feature.IGNORE_EOS,
    Feature.CONTEXT_SHIFT,
    Feature.ADAPTER,
    Feature.DRY,
    Feature.XTC,
}
_CONSTRAINED = {Feature.GRAMMAR, Feature.JSON_SCHEMA, Feature.REGEX}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's file says it can do. `template_problem` says why a chat template that it has cannot be used."""

    features: frozenset[Feature]
    generates: bool
    trained_context: int
    template_problem: str = ""


class PromptReader:
    """Turns prompts into token ids with one model's template and vocabulary. Thread-safe while the model is open."""

    def __init__(self, model: Model, template: str | None) -> None:
        """`template` overrides the model's own."""
        self._model = model
        self.forms = constraint.FormCompiler(model)
        self._template: ChatTemplate | None = None
        problem = ""
        generates = model.generates
        source = template or model.chat_template()
        if source and generates:
            try:
                self._template = ChatTemplate(
                    source, bos=self._text(model.bos), eos=self._text(model.eos), control_texts=model.control_texts()
                )
            except ModelFileError as error:
                problem = error.message
        features = set(_ALWAYS)
        if generates:
            features |= _GENERATING
            if constraint.is_available():
                features |= _CONSTRAINED
        if model.embeds:
            features.add(Feature.EMBED)
        if model.ranks:
            features.add(Feature.RERANK)
        if self._template is not None:
            features.add(Feature.CHAT)
            if self._template.calls_as_tags:
                features.add(Feature.TOOLS)
        self.facts = ModelFacts(frozenset(features), generates, model.trained_context, problem)

    def read(self, prompt: Prompt, tools: Sequence[Tool]) -> list[int]:
        """The token ids of a prompt; never empty.

        A raw prompt is the caller's own markup: the texts of special tokens in it become those tokens. A
        conversation's messages cannot contain special tokens (see `template`). The model's own token at the start of
        a text is added where the model wants one and the prompt does not begin with it. Raises `InvalidRequestError`.
        """
        if isinstance(prompt, TokenPrompt):
            ids = list(prompt.token_ids)
            for token_id in ids:
                if not 0 <= token_id < self._model.vocabulary_size:
                    raise InvalidRequestError("token_ids", f"{token_id} is not in the vocabulary of this model")
        elif isinstance(prompt, TextPrompt):
            ids = self._with_start(self._tokens(prompt.text))
        else:
            ids = self._with_start(self._rendered(prompt, tools))
        if not ids:
            raise InvalidRequestError("prompt", "has no tokens")
        return ids

    def _rendered(self, conversation: Conversation, tools: Sequence[Tool]) -> list[int]:
        if self._template is None:
            raise InvalidRequestError("conversation", "this model has no chat template")
        rendered = self._template.render(conversation, tools)
        return [token_id for piece in rendered.pieces for token_id in self._tokens(piece)]

    def _tokens(self, text: str) -> list[int]:
        try:
            return self._model.tokenize(text, add_special=False, parse_special=True)
        except UnicodeEncodeError as error:
            raise InvalidRequestError("prompt", "holds half a surrogate pair, which is no Unicode text") from error

    def _with_start(self, ids: list[int]) -> list[int]:
        model = self._model
        return [model.bos, *ids] if model.adds_bos and ids[:1] != [model.bos] else ids

    def _text(self, token_id: int) -> str:
        if token_id < 0:
            return ""
        return self._model.piece_of(token_id, show_special=True).decode("utf-8", "replace")


def text_size(prompt: Prompt) -> int:
    """About how many characters a prompt has: how long reading it will take."""
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    if isinstance(prompt, TokenPrompt):
        return len(prompt.token_ids)
    return sum(_MESSAGE_SIZE + sum(map(_part_size, message.parts)) for message in prompt.messages)


def _part_size(part: Part) -> int:
    if isinstance(part, ImagePart):
        return 0  # no text; a model that cannot see refuses it
    return len(part.arguments_json if isinstance(part, ToolCall) else part.text)
