"""Ollama's own API: every model on its disk, those in memory, and streams of JSON lines."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from chorus.core.errors import ChorusError, EngineError, PromptTooLongError, UnavailableError
from chorus.core.fleet.records import Artifact, Feature, ModelState, ModelStatus
from chorus.core.generation import (
    Conversation,
    FinishReason,
    GenerationRequest,
    ImagePart,
    Message,
    TextPart,
    ToolCall,
    ToolChoice,
    ToolResult,
)
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
    json_of,
    raw_prompt,
    unsupported,
    whole,
)
from chorus.engine.remote.failures import RefusedKeyError, failure
from chorus.engine.remote.http import Asked, Http
from chorus.engine.remote.naming import family_of, parameters_of, quantization_of, tier_of
from chorus.engine.remote.settings import RemoteSettings
from chorus.telemetry.logs import get_logger

_NAME = "ollama"
# What it gives a model by itself where nobody says otherwise and memory is short.
_DEFAULT_CONTEXT = 4096
_NS = 1e9
_DISK_EVERY = 5
_BLOB = re.compile(r"^FROM .*[/\\]sha256[-:]([0-9a-f]{64})\s*$", re.MULTILINE)
_NUM_CTX = re.compile(r"^\s*num_ctx\s+(\d+)\s*$", re.MULTILINE)
_SAMPLES = frozenset({Feature.SEED, Feature.PENALTIES, Feature.TYPICAL, Feature.JSON_SCHEMA})
_CAPABILITIES = {
    "completion": frozenset({Feature.CHAT}) | _SAMPLES,
    "tools": frozenset({Feature.TOOLS}),
    "vision": frozenset({Feature.IMAGES}),
    "thinking": frozenset({Feature.REASONING}),
    "embedding": frozenset({Feature.EMBED}),
}
# Versions before 0.6.4 tell no capabilities; these architectures make vectors and nothing else.
_EMBEDDERS = ("bert", "nomic-bert", "jina-bert-v2")

_Key: TypeAlias = tuple[str, str]
"""A model's name and digest."""

_log = get_logger()


class OllamaDialect:
    """Implements `Dialect`."""

    loads = True

    def __init__(self, http: Http, settings: RemoteSettings) -> None:
        self._http = http
        self._external = not settings.server.is_household
        self._slots = settings.slots
        self._context_length = settings.context_length
        self._version = ""
        self._on_disk: list[Mapping[str, Any]] | None = None
        self._age = 0
        self._shown: dict[_Key, Mapping[str, Any]] = {}
        self._broken: set[_Key] = set()
        self._loaded_with: dict[str, int] = {}

    async def find(self) -> Found:
        """Asks for the models in memory, and now and then for those on disk; about each of them only once.

        Ollama logs every question: the fewer, the better its log can be read.
        """
        try:
            running = as_mapping(await self._http.ask("/api/ps"))
            warm = {_id(entry): entry for entry in as_objects(running.get("models"))}
            if self._on_disk is None or self._age >= _DISK_EVERY or not warm.keys() <= {*map(_id, self._on_disk)}:
                self._on_disk, self._age = await self._listed(), 0
            await self._show_new(self._on_disk, again=self._age == 0)
            self._age += 1
        except ChorusError:
            self._on_disk = None  # whoever comes back may be another
            raise
        models = []
        for entry in self._on_disk:
            shown = self._shown.get(_key(entry), {})
            # Ollama passes prompts for a cloud model on to its makers, which nobody here would see.
            elsewhere = any(as_text(about.get("remote_host")) for about in (entry, shown))
            if shown and not elsewhere:
                models.append(self._model(entry, shown, warm.get(_id(entry))))
        return Found(_NAME, self._version, tuple(models))

    async def _show_new(self, on_disk: Sequence[Mapping[str, Any]], *, again: bool) -> None:
        """Asks about the models that it has told nothing of; `again`: about those as well that were broken then."""
        keys = [_key(entry) for entry in on_disk]
        for key in dict.fromkeys(keys):
            if key not in self._shown and (again or key not in self._broken):
                await self._show(key)
        self._shown = {key: shown for key, shown in self._shown.items() if key in keys}
        self._broken.intersection_update(keys)

    async def _show(self, key: _Key) -> None:
        """Asks about one model. Where that model is broken the others need not suffer for it."""
        try:
            shown, why = as_mapping(await self._http.ask("/api/show", {"model": key[0]})), "it tells nothing of it"
        except (UnavailableError, RefusedKeyError):
            raise
        except ChorusError as error:
            shown, why = {}, error.message
        if shown:
            self._shown[key] = shown
            self._broken.discard(key)
        elif key not in self._broken:
            self._broken.add(key)
            _log.warning("remote.model_broken", server=self._http.server, model=key[0], why=why)

    async def _listed(self) -> list[Mapping[str, Any]]:
        tags = as_mapping(await self._http.ask("/api/tags"))
        if not isinstance(tags.get("models"), list):
            raise EngineError(f"{self._http.server} lists no models; is it Ollama?")
        if self._on_disk is None:
            self._version = as_text(as_mapping(await self._http.ask("/api/version")).get("version"))
        return as_objects(tags["models"])

    def generation(self, model: RemoteModel, request: GenerationRequest, seed: int) -> Call:
        """A call of /api/chat, or of /api/generate with the text as it is."""
        sampling = request.sampling
        limit = request.tokens_left
        options: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "typical_p": sampling.typical_p,
            "repeat_last_n": sampling.penalty_window,
            "repeat_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "seed": seed,
            # Without a limit, older versions shift the context and go on for ever.
            "num_predict": model.status.context_length if limit is None else max(1, limit),
        }
        if request.stop.strings:
            options["stop"] = list(request.stop.strings)
        if request.stop.token_ids:
            raise unsupported(model, Feature.TOKEN_IDS, "stop at token ids")
        self._put_context(options, model.id)
        # Rather an error than a prompt or an answer without its beginning; versions that don't know these ignore them.
        body: dict[str, Any] = {
            "model": model.id,
            "stream": True,
            "options": options,
            "truncate": False,
            "shift": False,
        }
        if request.constraint is not None:
            body["format"] = json_of(request.constraint.kind, request.constraint.source)
        prompt = raw_prompt(model, request)
        if prompt is not None:
            return Call("/api/generate", body | {"prompt": prompt, "raw": True})
        conversation = request.prompt
        assert isinstance(conversation, Conversation)
        if conversation.continue_last or request.resume:
            raise unsupported(model, Feature.RESUME, "go on with a message of a conversation")
        variables = dict(conversation.template_variables)
        if "enable_thinking" in variables:
            body["think"] = bool(variables.pop("enable_thinking"))
        if variables:
            raise unsupported(model, Feature.CHAT, f"fill in {', '.join(sorted(variables))}: its templates are its own")
        body["messages"] = [said for message in conversation.messages for said in _messages(message)]
        if request.tools and request.tool_choice is not ToolChoice.NONE:
            if request.tool_choice is ToolChoice.REQUIRED:
                raise unsupported(model, Feature.TOOLS, "be made to call a tool; leave the choice to it")
            body["tools"] = [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": dict(tool.parameters) or {"type": "object", "properties": {}},
                    },
                }
                for tool in request.tools
            ]
        return Call("/api/chat", body)

    def reader(self, model: RemoteModel) -> OllamaReader:
        """A reader of JSON lines."""
        return OllamaReader(self._http.server, model)

    async def embed(self, model: RemoteModel, text: str, truncate: bool) -> tuple[Sequence[float], int]:
        """Calls /api/embed, which normalizes every vector."""
        options: dict[str, Any] = {}
        self._put_context(options, model.id)
        body = {"model": model.id, "input": text, "truncate": truncate, "options": options}
        answer = as_mapping(await self._http.post("/api/embed", body, _asked(model)))
        vectors = answer.get("embeddings")
        if not isinstance(vectors, list) or len(vectors) != 1 or not isinstance(vectors[0], list):
            raise EngineError(f"{self._http.server} answered one text with no vector")
        count = as_int(answer.get("prompt_eval_count"))
        if not truncate and count > model.status.context_length > 0:  # a version that knows no `truncate`
            raise PromptTooLongError(count, model.status.context_length, model=model.status.artifact.name)
        return vectors[0], count

    async def load(self, model: RemoteModel, context_length: int | None) -> None:
        """Loads a model by asking it nothing."""
        if context_length is not None:
            self._loaded_with[model.id] = context_length
        options: dict[str, Any] = {}
        self._put_context(options, model.id)
        await self._ask_nothing(model, {"options": options} if options else {})

    async def unload(self, model: RemoteModel) -> None:
        """Unloads a model by keeping it for no time."""
        self._loaded_with.pop(model.id, None)
        await self._ask_nothing(model, {"keep_alive": 0})

    async def _ask_nothing(self, model: RemoteModel, more: Mapping[str, Any]) -> None:
        body = {"model": model.id, "stream": False, **more}
        if Feature.EMBED in model.status.features and Feature.CHAT not in model.status.features:
            await self._http.post("/api/embed", body | {"input": []}, _asked(model))
            return
        answer = as_mapping(await self._http.post("/api/generate", body, _asked(model)))
        if answer.get("done") is not True:
            raise EngineError(f"{self._http.server} did not say that it is done with {model.id}")

    def _put_context(self, options: dict[str, Any], model_id: str) -> None:
        # Only what somebody asked for: another length than that of the model in memory makes Ollama load it again.
        wanted = self._loaded_with.get(model_id) or self._context_length
        if wanted:
            options["num_ctx"] = wanted

    def _model(self, entry: Mapping[str, Any], shown: Mapping[str, Any], warm: Mapping[str, Any] | None) -> RemoteModel:
        name = _id(entry)
        details = as_mapping(shown.get("details")) or as_mapping(entry.get("details"))
        info = as_mapping(shown.get("model_info"))
        architecture = as_text(info.get("general.architecture")) or as_text(details.get("family"))
        trained = as_int(info.get(f"{architecture}.context_length"))
        count = as_int(info.get("general.parameter_count")) or parameters_of(as_text(details.get("parameter_size")))
        capabilities = shown.get("capabilities")
        if not isinstance(capabilities, list) or not capabilities:
            capabilities = ["embedding"] if architecture in _EMBEDDERS else ["completion"]
        told = [c for c in capabilities if isinstance(c, str)]
        features: frozenset[Feature] = frozenset().union(*(_CAPABILITIES.get(c, frozenset()) for c in told))
        blobs = _BLOB.findall(as_text(shown.get("modelfile")))
        artifact = Artifact(
            family=family_of(name),
            name=name,
            # The digest that it lists is its manifest's, not the file's. With two files, which is which isn't told.
            sha256=blobs[0] if len(blobs) == 1 and details.get("format") == "gguf" else "",
            size_bytes=as_int(entry.get("size")),
            quantization=as_text(details.get("quantization_level")) or quantization_of(name),
            parameter_count=count,
            context_length=trained,
            architecture=architecture,
            tier=tier_of(count, external=self._external),
            tags=_tags(features),
        )
        own = _NUM_CTX.search(as_text(shown.get("parameters")))
        usual = int(own.group(1)) if own else min(trained or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
        context = self._loaded_with.get(name) or self._context_length or usual
        if warm is not None:
            context = as_int(warm.get("context_length")) or context
        status = ModelStatus(
            artifact=artifact,
            engine=_NAME,
            state=ModelState.AVAILABLE if warm is None else ModelState.LOADED,
            features=features,
            context_length=min(context, trained) if trained else context,
            slot_count=self._slots,
        )
        return RemoteModel(name, status)


class OllamaReader:
    """Reads the lines of /api/chat and /api/generate."""

    def __init__(self, server: str, model: RemoteModel) -> None:
        self._server = server
        self._model = model
        self._calls = 0

    def read(self, line: bytes) -> Piece:
        """What the next line says."""
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise EngineError(f"{self._server} sent a line that is no JSON object")
        if "error" in said:
            asked = _asked(self._model)
            raise failure(0, said, server=self._server, model=asked.model, context_length=asked.context_length)
        message = as_mapping(said.get("message"))
        calls = tuple(self._call(call) for call in as_objects(message.get("tool_calls")))
        done = said.get("done") is True
        finish = None
        if done and said.get("done_reason") in ("load", "unload"):
            raise EngineError(f"{self._server} loaded or unloaded the model and answered nothing")
        if done:
            cut = said.get("done_reason") == "length"
            finish = FinishReason.LENGTH if cut else FinishReason.TOOL_CALL if self._calls else FinishReason.END
        return Piece(
            text=whole(as_text(message.get("content")) or as_text(said.get("response"))),
            reasoning=whole(as_text(message.get("thinking")) or as_text(said.get("thinking"))),
            tool_calls=calls,
            finish=finish,
            spent=_spent(said) if done else None,
            last=done,
        )

    def _call(self, call: Mapping[str, Any]) -> ToolCall:
        function = as_mapping(call.get("function"))
        self._calls += 1
        arguments = json.dumps(as_mapping(function.get("arguments")), ensure_ascii=False)
        return ToolCall(
            as_text(call.get("id")) or f"call_{self._calls}", as_text(function.get("name")), whole(arguments)
        )


def _spent(said: Mapping[str, Any]) -> Spent:
    return Spent(
        prompt_tokens=as_int(said.get("prompt_eval_count")),
        completion_tokens=as_int(said.get("eval_count")),
        load_s=as_int(said.get("load_duration")) / _NS,
        prefill_s=as_int(said.get("prompt_eval_duration")) / _NS,
        decode_s=as_int(said.get("eval_duration")) / _NS,
    )


def _messages(message: Message) -> list[dict[str, Any]]:
    """A message as Ollama takes it; each tool's result is a message of its own."""
    results = [part for part in message.parts if isinstance(part, ToolResult)]
    said = [{"role": "tool", "content": part.text, "tool_call_id": part.tool_call_id} for part in results]
    rest = [part for part in message.parts if not isinstance(part, ToolResult)]
    if not rest:
        return said
    entry: dict[str, Any] = {
        "role": message.role.value,
        "content": "".join(part.text for part in rest if isinstance(part, TextPart)),
    }
    images = [base64.b64encode(part.data).decode() for part in rest if isinstance(part, ImagePart)]
    calls = [part for part in rest if isinstance(part, ToolCall)]
    if images:
        entry["images"] = images
    if calls:
        entry["tool_calls"] = [
            {
                "function": {
                    "name": call.name,
                    "arguments": json_of("tool_call.arguments_json", call.arguments_json or "{}"),
                }
            }
            for call in calls
        ]
    return [*said, entry]


def _tags(features: frozenset[Feature]) -> tuple[str, ...]:
    tags = {Feature.CHAT: "chat", Feature.TOOLS: "tools", Feature.IMAGES: "vision", Feature.REASONING: "reasoning"}
    found = tuple(tag for feature, tag in tags.items() if feature in features)
    return found or (("embedding",) if Feature.EMBED in features else ())


def _id(entry: Mapping[str, Any]) -> str:
    return as_text(entry.get("model")) or as_text(entry.get("name"))


def _key(entry: Mapping[str, Any]) -> _Key:
    return _id(entry), as_text(entry.get("digest"))


def _asked(model: RemoteModel) -> Asked:
    return Asked(model.status.artifact.name, model.status.context_length)
