"""What the protocols have in common: what is found at a server, what is asked of it, and what a line of it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

from chorus.core.errors import InvalidRequestError, UnsupportedFeatureError
from chorus.core.fleet.records import Feature, ModelStatus
from chorus.core.generation import FinishReason, GenerationRequest, TextPrompt, ToolCall
from chorus.core.text.strict_json import parse_json

SEED_LIMIT = (1 << 31) - 1
"""Seeds are below this at every server; -1 and its like mean a random one at most."""


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model as the server has it: `id` is its name there, `slots` how many it decodes at once (0: untold)."""

    id: str
    status: ModelStatus
    slots: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """Everything found at a server."""

    name: str
    version: str
    models: tuple[RemoteModel, ...]


@dataclass(frozen=True, slots=True)
class Spent:
    """What the server says a request used and how long it took, in seconds; None and 0 where it doesn't say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def after(self, earlier: Spent) -> Spent:
        """This, with what only an earlier line of the same stream told."""
        return Spent(*(new or old for new, old in zip(astuple(self), astuple(earlier), strict=True)))


@dataclass(frozen=True, slots=True)
class Piece:
    """What one line of a stream says. `finish` is set once the answer is whole; `last` where no line matters after."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish: FinishReason | None = None
    stop_string: str = ""
    spent: Spent | None = None
    last: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A POST. Where `counts` is true, every line says what was used so far, so that stopping early loses no count.

    `echo` is text that the server may repeat at the start of its answer.
    """

    path: str
    body: Mapping[str, Any]
    counts: bool = False
    echo: str = ""


class Reader(Protocol):
    """Reads one stream."""

    def read(self, line: bytes) -> Piece:
        """What the next line says. Raises `ChorusError` where it tells of a failure, or makes no sense."""
        ...


class Dialect(Protocol):
    """One protocol."""

    loads: bool
    """Whether models can be loaded and unloaded."""

    async def find(self) -> Found:
        """Asks the server what it is and has. Raises `UnavailableError`, `EngineError`, `RefusedKeyError`."""
        ...

    def generation(self, model: RemoteModel, request: GenerationRequest, seed: int) -> Call:
        """The call that generates. Raises `UnsupportedFeatureError` for what no feature stands for."""
        ...

    def reader(self, model: RemoteModel) -> Reader:
        """A reader for one stream of the call."""
        ...

    async def embed(self, model: RemoteModel, text: str, truncate: bool) -> tuple[Sequence[float], int]:
        """The vector of one text, and how many tokens it had. Raises `PromptTooLongError` unless `truncate`."""
        ...

    async def load(self, model: RemoteModel, context_length: int | None) -> None:
        """Loads a model; only where `loads`."""
        ...

    async def unload(self, model: RemoteModel) -> None:
        """Unloads a model; only where `loads`."""
        ...


def unsupported(model: RemoteModel, feature: Feature, what: str) -> UnsupportedFeatureError:
    """The error for what a server cannot do."""
    status = model.status
    return UnsupportedFeatureError(
        f"{status.artifact.name} on {status.engine} cannot {what}",
        metadata={"feature": feature.value, "model": status.artifact.name},
    )


def delivered_text(model: RemoteModel, request: GenerationRequest) -> str:
    """The text that the stream goes on from; empty where it begins. Raises where ids alone were delivered."""
    for delivered in request.resume:
        if delivered.token_ids and not delivered.text:
            raise unsupported(model, Feature.RESUME, "go on from token ids; give the delivered text")
        if delivered.text and request.constraint is not None:  # whose beginning it would look for in what is to come
            raise unsupported(model, Feature.RESUME, "go on with a text that must have a form; ask for it anew")
        return delivered.text
    return ""


def raw_prompt(model: RemoteModel, request: GenerationRequest) -> str | None:
    """The whole text of a text prompt, with what was delivered; None where the prompt is a conversation."""
    if isinstance(request.prompt, TextPrompt):
        return request.prompt.text + delivered_text(model, request)
    return None


def json_of(field: str, text: str) -> Any:
    """The value that JSON text spells. Raises `InvalidRequestError`, naming the field of the request that it is."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise InvalidRequestError(field, f"is not JSON: {error}") from None


def whole(text: str) -> str:
    """The text with every half of a surrogate pair, which JSON may hold, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def as_int(value: object) -> int:
    """A count out of JSON; 0 where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 62 else 0


def as_mapping(value: object) -> Mapping[str, Any]:
    """An object out of JSON; an empty one where it is none."""
    return value if isinstance(value, dict) else {}


def as_objects(value: object) -> list[Mapping[str, Any]]:
    """The objects of a JSON array; none where it is no array."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def as_text(value: object) -> str:
    """A string out of JSON; an empty one where it is none."""
    return value if isinstance(value, str) else ""
