"""Servers compatible with OpenAI's API: what each is known to do beyond it, and its streams of server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chorus.core.errors import ChorusError, EngineError, OverloadedError, UnavailableError, UnsupportedFeatureError
from chorus.core.fleet.records import Artifact, Feature, ModelState, ModelStatus
from chorus.core.generation import FinishReason, GenerationRequest, ToolCall
from chorus.engine.remote.dialect import (
    Call,
    Found,
    Piece,
    RemoteModel,
    Spent,
    as_int,
    as_mapping,
    as_objects,
    as_text,
    unsupported,
    whole,
)
from chorus.engine.remote.failures import RefusedKeyError, ServerFailedError, failure
from chorus.engine.remote.http import Asked, Http
from chorus.engine.remote.naming import family_of, parameters_of, quantization_of, short_name, tier_of
from chorus.engine.remote.openai_request import call_of
from chorus.engine.remote.settings import RemoteSettings

_COMMON = frozenset({Feature.CHAT})
_LLAMA_SERVER = _COMMON | {
    Feature.TOOLS,
    Feature.JSON_SCHEMA,
    Feature.GRAMMAR,
    Feature.SEED,
    Feature.PENALTIES,
    Feature.TYPICAL,
    Feature.DRY,
    Feature.XTC,
    Feature.IGNORE_EOS,
}
_VLLM = _COMMON | {
    Feature.TOOLS,
    Feature.JSON_SCHEMA,
    Feature.SEED,
    Feature.PENALTIES,
    Feature.LOGIT_BIAS,
    Feature.IGNORE_EOS,
}
_OPENAI = _COMMON | {Feature.TOOLS, Feature.JSON_SCHEMA}


@dataclass(frozen=True, slots=True)
class _Make:
    """A make of server, by what it calls the owner of its models."""

    name: str
    owners: tuple[str, ...]
    features: frozenset[Feature]


_MAKES = (
    _Make("vllm", ("vllm",), _VLLM),
    _Make("llama-server", ("llamacpp",), _LLAMA_SERVER),
    _Make("openai", ("openai", "openai-internal", "system"), _OPENAI),
)
_MOST_POLLS = 64
# Of any other nothing is known but that it answers messages; it may well ignore the rest without a word.
_UNKNOWN = _Make("openai", (), _COMMON)


@dataclass(slots=True)
class _Probe:
    """Whether a model makes vectors, as far as its server has told; one that fails to is asked ever more rarely."""

    makes_vectors: bool | None = None
    failures: int = 0
    polls_left: int = 0

    def is_due(self) -> bool:
        """Whether to ask at this poll."""
        if self.makes_vectors is not None:
            return False
        self.polls_left -= 1
        return self.polls_left < 0

    def take(self, makes_vectors: bool | None) -> None:
        """Takes what the server said; None: it failed."""
        self.makes_vectors = makes_vectors
        self.polls_left = min(1 << self.failures, _MOST_POLLS)
        self.failures += makes_vectors is None


class OpenAiDialect:
    """Implements `Dialect`."""

    loads = False

    def __init__(self, http: Http, settings: RemoteSettings) -> None:
        self._http = http
        self._external = not settings.server.is_household
        self._slots = settings.slots
        self._context_length = settings.context_length
        self._probes: dict[str, _Probe] = {}
        self._make = _UNKNOWN
        self._version = ""
        self._props: Mapping[str, Any] = {}

    async def find(self) -> Found:
        """Asks for the models; for more about server and models only once, while the list stays the same."""
        try:
            answer = as_mapping(await self._http.ask("/v1/models"))
        except UnavailableError:
            self._probes.clear()  # whoever comes back may be another
            raise
        if not isinstance(answer.get("data"), list):
            raise EngineError(f"{self._http.server} lists no models; is it compatible with OpenAI's API?")
        entries = [entry for entry in as_objects(answer["data"]) if as_text(entry.get("id"))]
        if any(entry["id"] not in self._probes for entry in entries):
            await self._look_closer(entries)
        self._probes = {entry["id"]: self._probes.get(entry["id"], _Probe()) for entry in entries}
        for model_id, probe in self._probes.items():
            if probe.is_due():
                probe.take(await self._makes_vectors(model_id))
        names = [short_name(entry["id"]) for entry in entries]
        models = [
            self._model(entry, name if names.count(name) == 1 else entry["id"])
            for entry, name in zip(entries, names, strict=True)
        ]
        return Found(self._make.name, self._version, tuple(models))

    def generation(self, model: RemoteModel, request: GenerationRequest, seed: int) -> Call:
        """A call of /v1/chat/completions, or of /v1/completions with the text as it is."""
        return call_of(self._make.name, model, request, seed)

    def reader(self, model: RemoteModel) -> OpenAiReader:
        """A reader of server-sent events."""
        return OpenAiReader(self._http.server, model)

    async def embed(self, model: RemoteModel, text: str, truncate: bool) -> tuple[Sequence[float], int]:
        """Calls /v1/embeddings. vLLM alone can cut a text off."""
        body: dict[str, Any] = {"model": model.id, "input": text, "encoding_format": "float"}
        if truncate:
            if self._make.name != "vllm":
                raise unsupported(model, Feature.EMBED, "cut off a text that is too long")
            body["truncate_prompt_tokens"] = -1
        answer = as_mapping(await self._http.post("/v1/embeddings", body, _asked(model)))
        data = as_objects(answer.get("data"))
        if len(data) != 1 or not isinstance(data[0].get("embedding"), list):
            raise EngineError(f"{self._http.server} answered one text with no vector")
        return data[0]["embedding"], as_int(as_mapping(answer.get("usage")).get("prompt_tokens"))

    async def load(self, model: RemoteModel, context_length: int | None) -> None:
        """Nothing to do: what the server lists is loaded."""

    async def unload(self, model: RemoteModel) -> None:
        """Raises `UnsupportedFeatureError`: the server decides what it has."""
        raise UnsupportedFeatureError(
            f"{self._http.server} has its models for as long as it runs; they cannot be unloaded",
            metadata={"feature": "unload", "model": model.status.artifact.name},
        )

    async def _look_closer(self, entries: list[Mapping[str, Any]]) -> None:
        owner = as_text(entries[0].get("owned_by")).lower()
        self._make = next((make for make in _MAKES if owner in make.owners), _UNKNOWN)
        self._props, self._version = {}, ""
        if self._make.name == "llama-server":
            self._props = await self._optional("/props")
            self._version = as_text(self._props.get("build_info"))
        elif self._make.name == "vllm":
            self._version = as_text((await self._optional("/version")).get("version"))

    async def _optional(self, path: str) -> Mapping[str, Any]:
        try:
            return as_mapping(await self._http.ask(path))
        except (UnavailableError, RefusedKeyError):
            raise
        except ChorusError:
            return {}

    async def _makes_vectors(self, model_id: str) -> bool | None:
        # No list tells, so it is tried; not where every word costs somebody money.
        if self._external:
            return "embed" in model_id.lower()
        try:
            answer = await self._http.ask("/v1/embeddings", {"model": model_id, "input": "a"}, work=True)
        except (UnavailableError, RefusedKeyError):
            raise
        except (OverloadedError, ServerFailedError):
            return None
        except ChorusError:
            return False
        return bool(as_objects(as_mapping(answer).get("data")))

    def _model(self, entry: Mapping[str, Any], name: str) -> RemoteModel:
        meta = as_mapping(entry.get("meta"))
        embeds = self._probes[entry["id"]].makes_vectors is True
        sees = as_mapping(self._props.get("modalities")).get("vision") is True
        features = frozenset({Feature.EMBED}) if embeds else self._make.features
        if sees and not embeds:
            features |= {Feature.IMAGES}
        if self._props and as_mapping(self._props.get("chat_template_caps")).get("supports_tools") is not True:
            features -= {Feature.TOOLS}  # it would leave them out of the prompt without a word
        count = as_int(meta.get("n_params")) or parameters_of(name)
        own = as_int(meta.get("n_ctx")) or as_int(entry.get("max_model_len"))
        own = own or as_int(as_mapping(self._props.get("default_generation_settings")).get("n_ctx"))
        slots = as_int(self._props.get("total_slots"))
        chat = ("chat", "vision") if sees else ("chat",)
        artifact = Artifact(
            family=family_of(name),
            name=name,
            sha256="",
            size_bytes=as_int(meta.get("size")),
            quantization=quantization_of(name) or as_text(meta.get("ftype")),
            parameter_count=count,
            context_length=as_int(meta.get("n_ctx_train")) or own,
            architecture="",
            tier=tier_of(count, external=self._external),
            tags=("embedding",) if embeds else chat,
        )
        status = ModelStatus(
            artifact=artifact,
            engine=self._make.name,
            state=ModelState.LOADED,
            features=features,
            context_length=min(filter(None, (own, self._context_length)), default=0),
            slot_count=min(slots, self._slots) if slots else self._slots,
        )
        return RemoteModel(entry["id"], status, slots)


class OpenAiReader:
    """Reads the events of /v1/chat/completions and /v1/completions, of one choice."""

    def __init__(self, server: str, model: RemoteModel) -> None:
        self._server = server
        self._model = model
        self._half = ""  # of a character that JSON wrote as two
        self._calls: dict[int, list[str]] = {}  # id, name, arguments

    def read(self, line: bytes) -> Piece:
        """What the next line says; comments and the names of events say nothing."""
        field, _, value = line.partition(b":")
        if field == b"error":  # llama-server's of old
            value = b'{"error":' + value + b"}"
        elif field != b"data":
            return Piece()
        value = value.strip()
        if value == b"[DONE]":
            return Piece(last=True)
        try:
            said = json.loads(value)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise EngineError(f"{self._server} sent an event that is no JSON object")
        if said.get("error") is not None or said.get("object") == "error":
            asked = _asked(self._model)
            raise failure(0, said, server=self._server, model=asked.model, context_length=asked.context_length)
        choice = next(iter(as_objects(said.get("choices"))), {})
        delta = as_mapping(choice.get("delta"))
        for call in as_objects(delta.get("tool_calls")):
            self._collect(call)
        finish = self._finish(choice.get("finish_reason"))
        stop = choice.get("stop_reason")
        return Piece(
            text=self._whole(as_text(delta.get("content")) or as_text(choice.get("text")), last=finish is not None),
            reasoning=whole(as_text(delta.get("reasoning_content")) or as_text(delta.get("reasoning"))),
            tool_calls=self._collected() if finish is not None else (),
            finish=FinishReason.STOP if finish is FinishReason.END and stop is not None else finish,
            stop_string=as_text(stop),
            spent=_spent(said),
        )

    def _finish(self, reason: object) -> FinishReason | None:
        if not isinstance(reason, str) or reason in ("", "null"):  # as some write that there is none yet
            return None
        if reason in ("error", "abort"):
            raise EngineError(f"{self._server} broke the answer off: it gives {reason!r} as the reason for its end")
        known = {
            "length": FinishReason.LENGTH,
            "tool_calls": FinishReason.TOOL_CALL,
            "function_call": FinishReason.TOOL_CALL,
        }
        return known.get(reason, FinishReason.END)

    def _collect(self, call: Mapping[str, Any]) -> None:
        function = as_mapping(call.get("function"))
        index = call.get("index")
        held = self._calls.setdefault(index if isinstance(index, int) else len(self._calls), ["", "", ""])
        held[0] = held[0] or as_text(call.get("id"))
        held[1] = held[1] or as_text(function.get("name"))
        held[2] += as_text(function.get("arguments"))

    def _collected(self) -> tuple[ToolCall, ...]:
        calls = []
        for number, (call_id, name, arguments) in enumerate(self._calls.values(), start=1):
            try:
                json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise EngineError(
                    f"{self._server} ended a call of {name[:64]!r} in the middle of its arguments"
                ) from None
            calls.append(ToolCall(call_id or f"call_{number}", name, whole(arguments or "{}")))
        return tuple(calls)

    def _whole(self, text: str, *, last: bool) -> str:
        text = self._half + text
        self._half = ""
        if text and not last and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return whole(text)


def _spent(said: Mapping[str, Any]) -> Spent | None:
    usage, timings = as_mapping(said.get("usage")), as_mapping(said.get("timings"))
    if not usage and not timings:
        return None
    cached = as_int(timings.get("cache_n")) or as_int(
        as_mapping(usage.get("prompt_tokens_details")).get("cached_tokens")
    )
    return Spent(
        prompt_tokens=as_int(usage.get("prompt_tokens")) or cached + as_int(timings.get("prompt_n")),
        completion_tokens=as_int(usage.get("completion_tokens")) or as_int(timings.get("predicted_n")),
        cached_tokens=cached,
        prefill_s=_milliseconds(timings.get("prompt_ms")),
        decode_s=_milliseconds(timings.get("predicted_ms")),
    )


def _milliseconds(value: object) -> float:
    return value / 1000 if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12 else 0.0


def _asked(model: RemoteModel) -> Asked:
    return Asked(model.status.artifact.name, model.status.context_length)
