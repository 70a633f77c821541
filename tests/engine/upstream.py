"""Model servers of other people's making, as their documents describe them, on loopback: Ollama's API and OpenAI's.

An answer is a pure function of prompt and seed, word by word. Servers fail as a test wants them to, and note what was
asked of them and who hung up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from chorus.config.remote import RemoteServer
from chorus.engine.remote import RemoteEngine, RemoteSettings

MANIFEST = "9f438cb9cd581fc025612d27f7c1a6669ff83a8bb0ed86c94fcf4c5440555697"
BLOB = "74701a8c35f6c8d9a4b91f3f3497643001d63e0c7a84e085bed452548fa88d45"


@dataclass
class UpstreamModel:
    """One model. `words` come before the end of text, where nothing ends it sooner."""

    name: str = "tiny:latest"
    capabilities: tuple[str, ...] = ("completion", "tools", "thinking")
    context: int = 512
    trained: int = 8192
    words: int = 64
    loaded: bool = True
    broken: bool = False
    cloud: bool = False


@dataclass
class Seen:
    """One request as it came in."""

    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Refusal:
    """An answer in place of the next generation's."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class Upstream:
    """Use it as `async with`. `make` is ollama, vllm, llamacpp, openai or another; the port stays the same after `die`.

    `pause_after`: streams say so many words and then wait for `go_on`. `cut_after`: the next stream breaks off after so
    many; `quietly` with a proper end of the HTTP answer.
    """

    def __init__(self, make: str, *models: UpstreamModel, api_key: str = "", slots: int = 2) -> None:
        self.make = make
        self.models = {model.name: model for model in models or (UpstreamModel(),)}
        self.api_key = api_key
        self.slots = slots
        self.seen: list[Seen] = []
        self.refusals: deque[Refusal] = deque()
        self.refuses = ""  # the path that the refusals are for; empty: what is streamed
        self.pause_after: int | None = None
        self.go_on = asyncio.Event()
        self.cut_after: int | None = None
        self.quietly = False
        self.extra_lines: Sequence[bytes | None] = []  # said in place of the next stream; None breaks it off
        self.nonsense: Any = None  # answered to every question about the server
        self.silent = False  # takes connections, answers nothing
        self.streams = 0
        self.hung_up = asyncio.Event()
        self.came = asyncio.Event()  # set at every request
        self.port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def setting(self) -> str:
        return f"{'ollama' if self.make == 'ollama' else 'openai'}={self.url}"

    async def __aenter__(self) -> Upstream:
        await self.live()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def live(self) -> None:
        """Serves, again at the same port."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, start_serving=True)
        self.port = self._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        """Closes every connection, as a killed process does."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)
        if self._server is not None:
            await self._server.wait_closed()
        self._server = None

    def asked(self, path: str) -> list[Any]:
        """The bodies of every request for a path, in order."""
        return [seen.body for seen in self.seen if seen.path == path]

    # --- HTTP -------------------------------------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._serve(reader, writer):
                    pass
        finally:
            writer.transport.abort()
            self._connections.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        path = head[0].split(" ")[1]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        request = Seen(path, headers, json.loads(body) if body else None)
        self.seen.append(request)
        self.came.set()
        if self.silent:
            await asyncio.get_running_loop().create_future()
        if self.api_key and headers.get("authorization") != f"Bearer {self.api_key}":
            return await self._say(writer, 401, self._error(401, "invalid key"))
        streams = isinstance(request.body, dict) and request.body.get("stream") is True
        if self.refusals and (path == self.refuses if self.refuses else streams):
            refusal = self.refusals.popleft()
            return await self._say(writer, refusal.status, refusal.body, refusal.headers)
        if self.nonsense is not None and not streams:
            return await self._say(writer, 200, self.nonsense)
        answer = self._answer(path, request.body)
        if isinstance(answer, tuple):
            return await self._say(writer, *answer)
        return await self._stream(reader, writer, answer)

    @staticmethod
    async def _say(writer: asyncio.StreamWriter, status: int, body: Any, headers: dict[str, str] | None = None) -> bool:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [
            f"HTTP/1.1 {status} x",
            f"content-length: {len(content)}",
            *(f"{k}: {v}" for k, v in (headers or {}).items()),
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        await writer.drain()
        return True

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lines: Iterator[Any]) -> bool:
        self.streams += 1
        gone = asyncio.create_task(reader.read(1))
        try:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for count, line in enumerate(self._as_planned(lines)):
                if count == self.pause_after:
                    going = asyncio.create_task(self.go_on.wait())
                    await asyncio.wait((gone, going), return_when=asyncio.FIRST_COMPLETED)
                    going.cancel()
                if gone.done() and not gone.result():
                    self.hung_up.set()
                    return False
                if line is None:
                    return False
                writer.write(b"%x\r\n%b\r\n" % (len(line), line))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            await writer.drain()
            return False  # a connection is for one stream
        except ConnectionError:
            self.hung_up.set()
            raise
        finally:
            self.streams -= 1
            gone.cancel()

    def _as_planned(self, lines: Iterator[Any]) -> Iterator[bytes | None]:
        """The bytes of each line; None where the connection breaks."""
        if self.extra_lines:
            yield from self.extra_lines
            self.extra_lines = []
            return
        cut, self.cut_after = self.cut_after, None
        for count, line in enumerate(lines):
            if cut is not None and count >= cut:
                if not self.quietly:
                    yield None
                return
            encoded = json.dumps(line, ensure_ascii=False).encode() if line is not None else b"[DONE]"
            yield encoded + b"\n" if self.make == "ollama" else b": ping\n\ndata: " + encoded + b"\n\n"

    # --- what they have in common -----------------------------------------------------------------------------------

    def _answer(self, path: str, body: Any) -> tuple[int, Any] | Iterator[Any]:
        return self._ollama(path, body) if self.make == "ollama" else self._openai(path, body)

    def _error(self, status: int, message: str, **more: Any) -> Any:
        if self.make == "ollama":
            return {"error": message}
        return {"error": {"message": message, "type": "Error", "code": status, **more}}

    def _no_model(self, name: object) -> tuple[int, Any]:
        words = f"model '{name}' not found" if self.make == "ollama" else f"The model `{name}` does not exist."
        return 404, self._error(404, words)

    def _words(self, model: UpstreamModel, prompt: str, body: Any, options: Any) -> list[str]:
        warm = options.get("temperature", 0.8) > 0
        told = f"{prompt}|{options.get('seed') if warm else ''}"
        tag = hashlib.sha256(told.encode()).hexdigest()[:4]
        room = model.context - len(prompt.split()) - 1
        limit = options.get("num_predict", options.get("max_tokens"))
        count = room if options.get("ignore_eos") else min(room, model.words)
        count = count if limit is None else min(count, limit)
        words = [f"{tag}{index} " for index in range(count)]
        for stop in options.get("stop", ()):
            text = "".join(words)
            if stop in text:
                words = [*text[: text.index(stop)].split(" ")]
        return words

    # --- Ollama -----------------------------------------------------------------------------------------------------

    def _ollama(self, path: str, body: Any) -> tuple[int, Any] | Iterator[Any]:
        if path == "/api/version":
            return 200, {"version": "0.12.6"}
        if path in ("/api/tags", "/api/ps"):
            listed = [model for model in self.models.values() if path == "/api/tags" or model.loaded]
            return 200, {"models": [self._listed(model, path == "/api/ps") for model in listed]}
        model = self.models.get(body["model"])
        if model is None:
            return self._no_model(body["model"])
        if path == "/api/show" and model.broken:
            return 500, self._error(500, "open blob: no such file")
        if path == "/api/show":
            return 200, {
                "modelfile": f"# made by ollama show\nFROM /var/lib/ollama/blobs/sha256-{BLOB}\nTEMPLATE x",
                "parameters": f'num_ctx                        {model.context}\nstop    "x"',
                "details": {
                    "format": "gguf",
                    "family": "llama",
                    "parameter_size": "1.2B",
                    "quantization_level": "Q4_0",
                },
                "model_info": {
                    "general.architecture": "llama",
                    "general.parameter_count": 1_235_814_400,
                    "llama.context_length": model.trained,
                },
                "capabilities": list(model.capabilities),
            }
        if path == "/api/embed":
            return self._embedded(model, body)
        if path == "/api/generate" and "prompt" not in body:
            model.loaded = body.get("keep_alive") != 0
            return 200, {"model": model.name, "response": "", "done": True, "done_reason": "load"}
        prompt = body["prompt"] if path == "/api/generate" else " ".join(m["content"] for m in body["messages"])
        if len(prompt.split()) >= model.context:
            return 400, self._error(400, "the input length exceeds the context length")
        model.loaded = True
        return self._ollama_lines(model, path, prompt, body)

    def _ollama_lines(self, model: UpstreamModel, path: str, prompt: str, body: Any) -> Iterator[Any]:
        words = self._words(model, prompt, body, body["options"])

        def line(text: str, **more: Any) -> Any:
            said = (
                {"response": text} if path == "/api/generate" else {"message": {"role": "assistant", "content": text}}
            )
            return {"model": model.name, "created_at": "2026-01-01T00:00:00Z", **said, "done": False, **more}

        if body.get("think"):
            yield {
                "model": model.name,
                "message": {"role": "assistant", "content": "", "thinking": "Hm."},
                "done": False,
            }
        if body.get("tools"):
            call = {"function": {"name": body["tools"][0]["function"]["name"], "arguments": {"city": "Köln"}}}
            yield {"message": {"role": "assistant", "content": "", "tool_calls": [call]}, "done": False}
            words = []
        if body.get("format"):
            words = ['{"age": ', "7}"]
        for word in words:
            yield line(word)
        cut = len(words) == body["options"]["num_predict"]
        yield line(
            "",
            done=True,
            done_reason="length" if cut else "stop",
            total_duration=900_000_000,
            load_duration=100_000_000,
            prompt_eval_count=len(prompt.split()) + 1,
            prompt_eval_duration=200_000_000,
            eval_count=len(words),
            eval_duration=500_000_000,
        )

    @staticmethod
    def _listed(model: UpstreamModel, running: bool) -> Any:
        entry: dict[str, Any] = {
            "name": model.name,
            "model": model.name,
            "size": 807_694_464,
            "digest": MANIFEST,
            "details": {"format": "gguf", "family": "llama", "parameter_size": "1.2B", "quantization_level": "Q4_0"},
        }
        if model.cloud:
            entry["remote_host"] = "https://ollama.com:443"
        return entry | {"context_length": model.context, "size_vram": 1} if running else entry

    def _embedded(self, model: UpstreamModel, body: Any) -> tuple[int, Any]:
        words = body["input"].split() if isinstance(body["input"], str) else []
        if not words:
            model.loaded = body.get("keep_alive") != 0
            return 200, {"model": model.name, "embeddings": []}
        if len(words) > model.context and not body["truncate"]:
            return 400, self._error(400, "the input length exceeds the context length")
        words = words[: model.context]
        return 200, {"embeddings": [_vector(words)], "prompt_eval_count": len(words), "total_duration": 1}

    # --- OpenAI -----------------------------------------------------------------------------------------------------

    def _openai(self, path: str, body: Any) -> tuple[int, Any] | Iterator[Any]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [self._entry(model) for model in self.models.values()]}
        if path == "/version" and self.make == "vllm":
            return 200, {"version": "0.11.0"}
        if path == "/props" and self.make == "llamacpp":
            caps = {"supports_tools": True, "supports_tool_calls": True}
            return 200, {"total_slots": self.slots, "build_info": "b7000", "chat_template_caps": caps}
        if path not in ("/v1/embeddings", "/v1/completions", "/v1/chat/completions"):
            return 404, b"<html>not found</html>"
        model = self.models.get(body["model"])
        if model is None:
            return self._no_model(body["model"])
        if path == "/v1/embeddings":
            if "embedding" not in model.capabilities:
                return 501, self._error(501, "This server does not support embeddings.")
            words = body["input"].split()
            if len(words) > model.context and "truncate_prompt_tokens" not in body:
                return 400, self._too_long(len(words), model.context)
            words = words[: model.context]
            usage = {"prompt_tokens": len(words), "total_tokens": len(words)}
            return 200, {"data": [{"index": 0, "embedding": _vector(words)}], "usage": usage}
        chat = path == "/v1/chat/completions"
        prompt = " ".join(str(m["content"]) for m in body["messages"]) if chat else body["prompt"]
        count = len(prompt.split()) + 1
        if count > model.context:
            return 400, self._too_long(count, model.context)
        return self._openai_lines(model, chat, prompt, body)

    def _too_long(self, count: int, context: int) -> Any:
        if self.make == "llamacpp":
            words = f"request ({count} tokens) exceeds the available context size ({context} tokens), try increasing it"
            return self._error(400, words, n_prompt_tokens=count, n_ctx=context)
        words = f"This model's maximum context length is {context} tokens. However, you requested {count + 9} tokens "
        return self._error(400, words + f"({count} in the messages, 9 in the completion). Please reduce the length.")

    def _openai_lines(self, model: UpstreamModel, chat: bool, prompt: str, body: Any) -> Iterator[Any]:
        words = self._words(model, prompt, body, body)
        prompt_tokens = len(prompt.split()) + 1
        said = 0

        def chunk(text: str, finish: str | None = None, **delta: Any) -> Any:
            choice = {"index": 0, "finish_reason": finish}
            choice |= {"delta": {"content": text, **delta}} if chat else {"text": text}
            whole = {"id": "x", "object": "chunk", "model": model.name, "choices": [choice]}
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": said, "total_tokens": prompt_tokens + said}
            if body["stream_options"].get("continuous_usage_stats"):
                whole["usage"] = usage
            if body.get("timings_per_token"):
                whole["timings"] = {
                    "cache_n": 1,
                    "prompt_n": prompt_tokens - 1,
                    "predicted_n": said,
                    "predicted_ms": 9.5,
                }
            return whole

        if chat:
            yield chunk("", role="assistant")
        finish = (
            "length" if len(words) == body.get("max_tokens") or len(words) == model.context - prompt_tokens else "stop"
        )
        if body.get("tools"):
            words, finish = [], "tool_calls"
            name = body["tools"][0]["function"]["name"]
            for piece in (
                {"id": "a1", "function": {"name": name, "arguments": '{"ci'}},
                {"function": {"arguments": 'ty":"Köln"}'}},
            ):
                yield chunk("", tool_calls=[{"index": 0, **piece}])
        for word in words:
            said += 1
            yield chunk(word)
        yield chunk("", finish)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": said, "total_tokens": prompt_tokens + said}
        yield {"id": "x", "object": "chunk", "choices": [], "usage": usage}
        yield None

    def _entry(self, model: UpstreamModel) -> Any:
        entry: dict[str, Any] = {"id": model.name, "object": "model", "owned_by": self.make}
        if self.make == "vllm":
            entry["max_model_len"] = model.context
        if self.make == "llamacpp":
            sizes = {
                "n_ctx": model.context,
                "n_ctx_train": model.trained,
                "n_params": 1_235_814_400,
                "size": 807_694_464,
            }
            entry["meta"] = sizes
        return entry


def _vector(words: list[str]) -> list[float]:
    digest = hashlib.sha256(" ".join(words).encode()).digest()[:8]
    return [byte - 127.5 for byte in digest]


async def until(condition: Callable[[], object], engine: RemoteEngine, bound_s: float = 10.0) -> None:
    """Returns once `condition()` holds, looked at whenever the engine says that something has changed."""
    changed = asyncio.Event()
    engine.on_change(changed.set)
    async with asyncio.timeout(bound_s):
        while not condition():
            await changed.wait()
            changed.clear()


@contextlib.asynccontextmanager
async def engine_of(upstream: Upstream, **changes: Any) -> AsyncIterator[RemoteEngine]:
    """An engine for the server, started; two slots, two places in the queue."""
    settings = RemoteSettings(RemoteServer.parse(upstream.setting), slots=2, max_queue=2)
    engine = RemoteEngine(replace(settings, **changes))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()
