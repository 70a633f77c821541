"""The servers under test, each in a process of its own: llama-server, a Chorus runner, and the Python wrapper."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from clients import Ask, Client, HttpClient
from grpc_client import GrpcClient
from processes import BenchmarkError, Processes, Started, free_port, say

from chorus.core.identity import Role
from chorus.local.lifeline import SUPERVISOR_ENV
from chorus.testing import packaged_models
from chorus.testing.certificates import MeshCertificates

_ROOT = Path(__file__).resolve().parent.parent
_READY_S = 120.0
_NAME = "bench"


@dataclass(frozen=True)
class Shape:
    """What each server is given: `slots` streams of `context_length` tokens each, so the same KV memory in total."""

    model: Path
    slots: int
    context_length: int
    threads: int


@dataclass(frozen=True)
class Server:
    """A running server and a client of it."""

    process: Started
    client: Client


def default_model() -> Path:
    """SmolLM2, which a package carries."""
    try:
        return packaged_models.smollm2_path()
    except FileNotFoundError as error:
        raise BenchmarkError(f"{error}; or name a GGUF file with --model") from error


def gemma_model() -> Path | None:
    """Gemma 3 270M, whose vocabulary is five times as large, where its packages are installed."""
    try:
        return packaged_models.gemma_path()
    except FileNotFoundError:
        return None


def cores() -> int:
    """Cores that this process may use: each server decodes with so many threads."""
    return len(os.sched_getaffinity(0))


def llama_server_program() -> Path:
    """Builds llama-server unless it is kept. Raises `BenchmarkError` where it can't be."""
    tool = [sys.executable, str(_ROOT / "tools" / "llama_server.py")]
    if subprocess.run(tool, stdout=sys.stderr, check=False).returncode != 0:
        raise BenchmarkError("there is no llama-server to compare with")
    printed = subprocess.run([*tool, "--path"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return Path(printed.strip())


async def start_llama_server(processes: Processes, shape: Shape, program: Path, *, unified: bool) -> Server:
    """llama-server with flash attention; everything else of it as it is by default, but what keeps no pace: its cache
    of prompts in memory and its web UI."""
    port = free_port()
    name = f"llama-server-{'unified' if unified else 'split'}"
    argv: list[str | Path] = [program, "--model", shape.model, "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--ctx-size", str(shape.slots * shape.context_length), "--parallel", str(shape.slots)]
    argv += ["--threads", str(shape.threads), "--threads-batch", str(shape.threads), "--flash-attn", "on"]
    argv += ["--kv-unified" if unified else "--no-kv-unified", "--cache-ram", "0", "--no-ui", "--offline"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    server = Server(processes.start(name, argv, environ), HttpClient(port))
    await _until_ready(server)
    return server


def mesh_environ(folder: Path, certificates: MeshCertificates) -> dict[str, str]:
    """The environment of a service whose certificates are in `folder`: no configuration of the user's, and it ends
    with this process."""
    return {name: value for name, value in os.environ.items() if not name.startswith("CHORUS_")} | {
        "XDG_CONFIG_HOME": str(folder),
        "XDG_STATE_HOME": str(folder),
        SUPERVISOR_ENV: str(os.getpid()),
        "CHORUS_MESH__TRUST_DOMAIN": certificates.authority.trust_domain,
        "CHORUS_MESH__CERTS_DIR": str(folder),
    }


@contextlib.asynccontextmanager
async def started_runner(processes: Processes, shape: Shape) -> AsyncIterator[Server]:
    """`chorus runner`, registered at a registry of its own, over mutual TLS with certificates made for it."""
    certificates = MeshCertificates()
    folder = processes.folder
    for role, name in ((Role.REGISTRY, "registry"), (Role.RUNNER, _NAME), (Role.ADMIN, _NAME)):
        certificates.leaf(role, name).write(folder)
    models = folder / "models" / "bench"
    models.mkdir(parents=True)
    (models / shape.model.name).symlink_to(shape.model)
    port, registry = free_port(), free_port()
    environ = mesh_environ(folder, certificates) | {
        "CHORUS_REGISTRY__LISTEN": f"127.0.0.1:{registry}",
        "CHORUS_RUNNER__NAME": _NAME,
        "CHORUS_RUNNER__LISTEN": f"127.0.0.1:{port}",
        "CHORUS_RUNNER__REGISTRIES": f"127.0.0.1:{registry}",
        "CHORUS_RUNNER__MODELS_DIR": str(folder / "models"),
        "CHORUS_RUNNER__MODELS": shape.model.name,
        "CHORUS_RUNNER__SLOTS": str(shape.slots),
        "CHORUS_RUNNER__SPECULATION": "false",  # llama-server guesses nothing either
        "CHORUS_RUNNER__CONTEXT_LENGTH": str(shape.context_length),
        "CHORUS_RUNNER__THREADS": str(shape.threads),
    }
    command = [sys.executable, "-m", "chorus.cli.main"]
    processes.start("registry", [*command, "registry"], environ)
    process = processes.start("runner", [*command, "runner"], environ)
    own = folder / f"{Role.ADMIN.value}-{_NAME}"  # a client would need a ticket
    tls = ssl.create_default_context(cafile=own / "ca.crt")
    tls.load_cert_chain(own / "tls.crt", own / "tls.key")
    client = GrpcClient(port, tls=tls, server_name=certificates.id(Role.RUNNER, _NAME).dns_name)
    try:
        await _until_ready(Server(process, client))
        yield Server(process, client)
    finally:
        client.close()


async def _until_ready(server: Server) -> None:
    """Returns once it has answered. Raises `BenchmarkError` if it doesn't within two minutes, or ends."""
    say(f"starting {server.process.name}")
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            async with asyncio.timeout(_READY_S):
                await server.client.generate(Ask("Once upon a time", 2))
            return
        except OSError as error:  # TimeoutError is one
            server.process.check()
            if time.monotonic() > deadline:
                raise BenchmarkError(
                    f"{server.process.name} did not answer within {_READY_S:.0f} s ({error}).\n"
                    f"{server.process.last_words()}"
                ) from None
        await asyncio.sleep(0.2)


class Wrapper:
    """`llama_cpp.Llama(flash_attn=True)` in a process of its own: one stream at a time, timed there."""

    def __init__(self, processes: Processes, shape: Shape) -> None:
        self.process = processes.start(
            "wrapper",
            [sys.executable, __file__, str(shape.model), str(shape.threads), str(shape.context_length)],
        )

    async def generate(self, ask: Ask) -> dict[str, Any]:
        """`first_s`, `total_s` and `gaps_s` of one stream. Raises `BenchmarkError` if it ends."""
        line = {"prompt": ask.prompt, "tokens": ask.tokens, "sampled": ask.sampled, "seed": ask.seed}
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()
        answer = await asyncio.to_thread(self.process.stdout.readline)
        if not answer:
            self.process.check()
            raise BenchmarkError("the wrapper's process closed its output")
        result: dict[str, Any] = json.loads(answer)
        return result


def serve_wrapper(model: str, threads: str, context_length: str) -> None:
    """The wrapper's process: one request a line, until its input ends."""
    from llama_cpp import Llama

    llama = Llama(model, n_ctx=int(context_length), n_threads=int(threads), n_threads_batch=int(threads),
                  flash_attn=True, verbose=False)  # fmt: skip
    for line in sys.stdin:
        ask = json.loads(line)
        chain = {"temp": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05} if ask["sampled"] else {"temp": 0.0}
        llama.reset()
        llama.set_seed(ask["seed"])
        began = time.perf_counter()
        tokens = llama.generate(llama.tokenize(ask["prompt"].encode()), repeat_penalty=1.0, **chain)
        arrivals = []
        for _ in range(ask["tokens"]):
            llama.detokenize([next(tokens)])
            arrivals.append(time.perf_counter())
        gaps = [later - earlier for earlier, later in pairwise(arrivals)]
        print(json.dumps({"first_s": arrivals[0] - began, "total_s": arrivals[-1] - began, "gaps_s": gaps}), flush=True)


if __name__ == "__main__":
    serve_wrapper(*sys.argv[1:])
