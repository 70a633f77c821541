"""One generation: what is asked of an engine, and the events that come back. The core's view of inference.v1.

Durations are seconds. Token ids are indexes into one model's vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

from chorus.core.fleet.records import Feature, Tier


class MessageRole(StrEnum):
    """Who speaks in a conversation; the values are those that chat templates know."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class ToolChoice(StrEnum):
    """Whether tools may or must be called."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


class Priority(StrEnum):
    """How urgent a request is."""

    INTERACTIVE = "interactive"
    BATCH = "batch"
    BACKGROUND = "background"


class FinishReason(StrEnum):
    """Why a choice ended."""

    END = "end"
    STOP = "stop"
    LENGTH = "length"
    CONTEXT_FULL = "context_full"
    TOOL_CALL = "tool_call"


class Phase(StrEnum):
    """What slow work goes on before the first token."""

    LOADING = "loading"
    PREFILL = "prefill"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"


# --- what is asked --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextPart:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture, as an encoded file."""

    data: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made of a tool; `arguments_json` as the model wrote it."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """A tool's answer to a call."""

    tool_call_id: str
    text: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """What the model thought before it answered."""

    text: str


Part: TypeAlias = TextPart | ImagePart | ToolCall | ToolResult | ReasoningPart


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: MessageRole
    parts: tuple[Part, ...]
    name: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the model may call; `parameters` is the JSON Schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    acts: bool = False


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Raw text, tokenized with the model's special tokens at its start."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Ready token ids, used as they are."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages for the model's own template."""

    messages: tuple[Message, ...]
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    continue_last: bool = False


Prompt: TypeAlias = TextPrompt | TokenPrompt | Conversation


@dataclass(frozen=True, slots=True)
class Dry:
    """The DRY repetition penalty. `window` None: the whole context."""

    multiplier: float
    base: float = 1.75
    allowed_length: int = 2
    window: int | None = None
    sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")


@dataclass(frozen=True, slots=True)
class Xtc:
    """The XTC sampler."""

    probability: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn, defaults filled in; the order of the steps is the engine's and documented there.

    `temperature` 0 takes the likeliest token. `top_k` 0 keeps all. `seed` None: the engine chooses one and tells it.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    dry: Dry | None = None
    xtc: Xtc | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    @property
    def penalizes(self) -> bool:
        """Whether any of the repetition, presence and frequency penalties acts."""
        return self.penalty_window != 0 and (
            self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When a choice ends. `max_tokens` None: as many as the context holds."""

    max_tokens: int | None = None
    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class ConstraintKind(StrEnum):
    """What form the text must have."""

    GRAMMAR = "grammar"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Constraint:
    """A form that the text must have: GBNF, JSON Schema as JSON text, or a regular expression."""

    kind: ConstraintKind
    source: str


@dataclass(frozen=True, slots=True)
class DeliveredChoice:
    """What one choice of an interrupted stream has delivered; `text` only where there are no token ids.

    `token_count` is that of the text, 0 where it is not known.
    """

    choice: int
    token_ids: tuple[int, ...]
    text: str = ""
    token_count: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens were delivered, as far as that is known."""
        return len(self.token_ids) or self.token_count


@dataclass(frozen=True, slots=True)
class Requirements:
    """What runner, node or model must be like. `context_length` 0: any."""

    labels: Mapping[str, str] = field(default_factory=dict)
    tier: Tier | None = None
    tags: tuple[str, ...] = ()
    context_length: int = 0
    artifact_sha256: str = ""
    runner_ids: tuple[str, ...] = ()
    node_ids: tuple[str, ...] = ()
    private: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate. `logprobs`: None for none, else how many alternatives a token."""

    model: str
    prompt: Prompt
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice.AUTO
    sampling: Sampling = field(default_factory=Sampling)
    stop: StopConditions = field(default_factory=StopConditions)
    choice_count: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    resume: tuple[DeliveredChoice, ...] = ()
    allow_text_resume: bool = False
    priority: Priority = Priority.INTERACTIVE
    requirements: Requirements = field(default_factory=Requirements)
    adapter: str = ""
    context_shift: bool = False
    session_id: str = ""

    @property
    def tokens_left(self) -> int | None:
        """How many tokens may still come of an answer with one choice, 0 where all were delivered; None: no limit."""
        limit = self.stop.max_tokens
        return None if limit is None else max(0, limit - sum(choice.tokens for choice in self.resume))

    def needed_features(self) -> frozenset[Feature]:
        """Every feature that an engine must have to serve this request as asked."""
        needed: set[Feature] = set()
        sampling = self.sampling
        if isinstance(self.prompt, Conversation):
            needed.add(Feature.CHAT)
            parts = [part for message in self.prompt.messages for part in message.parts]
            if any(isinstance(part, ImagePart) for part in parts):
                needed.add(Feature.IMAGES)
            if any(isinstance(part, ToolCall | ToolResult) for part in parts):
                needed.add(Feature.TOOLS)
        elif isinstance(self.prompt, TokenPrompt):
            needed.add(Feature.TOKEN_INPUT)
        wanted = {
            Feature.TOOLS: bool(self.tools) and self.tool_choice is not ToolChoice.NONE,
            Feature.MULTIPLE_CHOICES: self.choice_count > 1,
            Feature.LOGPROBS: self.logprobs is not None,
            Feature.PROMPT_LOGPROBS: self.prompt_logprobs is not None,
            Feature.RESUME: bool(self.resume) and not self.allow_text_resume,
            Feature.PENALTIES: sampling.penalizes,
            Feature.TYPICAL: sampling.typical_p < 1.0,
            Feature.DRY: sampling.dry is not None,
            Feature.XTC: sampling.xtc is not None,
            Feature.LOGIT_BIAS: bool(sampling.logit_bias),
            Feature.SEED: sampling.seed is not None,
            Feature.IGNORE_EOS: self.stop.ignore_eos,
            Feature.CONTEXT_SHIFT: self.context_shift,
            Feature.ADAPTER: bool(self.adapter),
        }
        needed.update(feature for feature, asked in wanted.items() if asked)
        if self.constraint is not None:
            needed.add(Feature(self.constraint.kind.value))
        return frozenset(needed)


@dataclass(frozen=True, slots=True)
class Fallback:
    """What may be done when no runner can serve a generation as asked.

    `similar_model`: another model with the same capability tags, of the nearest tier, may answer. `external`: a paid
    provider may be asked. `cached_answer`: an answer given before may be given again, however old.
    """

    similar_model: bool = False
    external: bool = False
    cached_answer: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts (or token ids) to embed. `truncate`: None refuses a text that is too long, else which end is cut off."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    normalize: bool = True
    truncate: str | None = None  # None, "start" or "end"
    priority: Priority = Priority.INTERACTIVE
    requirements: Requirements = field(default_factory=Requirements)


@dataclass(frozen=True, slots=True)
class Embedding:
    """One vector, with the number of tokens it stands for."""

    values: tuple[float, ...]
    token_count: int
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """Documents to order by how well each answers `query`.

    `top_n` None: all of them are told. `truncate` is that of an embedding, for the documents alone.
    """

    model: str
    query: str
    documents: tuple[str, ...]
    top_n: int | None = None
    truncate: str | None = None  # None, "start" or "end"
    priority: Priority = Priority.INTERACTIVE
    requirements: Requirements = field(default_factory=Requirements)


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document, by its place in the request, and its score: more is better, on a scale that is the model's own."""

    index: int
    score: float
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Ranking:
    """Documents, the best one first (of equals the earlier one); `token_count` were read for all of them."""

    results: tuple[Ranked, ...]
    token_count: int

    @classmethod
    def of(cls, ranked: Iterable[Ranked], token_count: int, top_n: int | None) -> Ranking:
        """The best `top_n` of them, in order."""
        results = sorted(ranked, key=lambda document: (-document.score, document.index))
        return cls(tuple(results[:top_n]), token_count)


# --- what comes back ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits behind `position` others."""

    position: int
    estimated_wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Slow work before the first token, in tokens for a prefill and bytes otherwise; `total` 0 where unknown."""

    phase: Phase
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has read the prompt and begins to decode."""

    model: str
    artifact: str
    artifact_sha256: str
    prompt_tokens: int
    cached_tokens: int
    seed: int
    context_length: int


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that might have come; `bytes` need not be valid UTF-8 alone."""

    token_id: int
    logprob: float
    bytes: bytes


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability (natural), before any sampling step changed it."""

    token_id: int
    logprob: float
    bytes: bytes
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Substitution:
    """Another model answers than the one asked for; `reason` is that of the error it would have ended with."""

    requested_model: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log-probabilities of the prompt's tokens; the first has none and says 0."""

    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of one choice. `index` is the place of the first of them; `text` is always whole characters."""

    choice: int
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    tool_call: ToolCall | None = None


@dataclass(frozen=True, slots=True)
class ChoiceOutcome:
    """How one choice ended."""

    choice: int
    reason: FinishReason
    token_count: int
    stop_string: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request used; `completion_tokens` over all choices, earlier attempts included.

    `cost_micro_usd` is what paid providers are owed for all attempts, in millionths of a US dollar.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_micro_usd: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """How long the parts took, in seconds, and the decode rate over all choices in tokens a second."""

    queue_s: float = 0.0
    load_s: float = 0.0
    prefill_s: float = 0.0
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0
    tokens_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a generation that succeeded; always the last event."""

    choices: tuple[ChoiceOutcome, ...]
    usage: Usage
    timings: Timings


Event: TypeAlias = Queued | Progress | Started | PromptScored | TokenDelta | Finished
