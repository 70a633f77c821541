"""A remote engine that tells no token ids is killed under streams: each ends with UNAVAILABLE and what was delivered,
or goes on from the delivered text, labelled so, where the caller allowed that (DESIGN.md, section 3)."""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from meshes import Mesh, Shape
from oracle import ask
from processes import Processes, Started, free_port, processes_in, say
from text_server import WORDS

from chorus.client import AttemptChanged, MeshClient, StartedAt
from chorus.core.errors import ChorusError, UnavailableError
from chorus.core.generation import TokenDelta

_SERVER = Path(__file__).resolve().parent / "text_server.py"
_RUNNERS = ("ada", "bob")
_WHOLE = "".join(f"w{number} " for number in range(WORDS))


class _Servers:
    """The server behind each runner, which can be killed and started again."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._ports = {runner: free_port() for runner in _RUNNERS}
        self._started = {runner: self._start(runner) for runner in _RUNNERS}

    @property
    def own(self) -> dict[str, dict[str, str]]:
        """The settings of each runner."""
        return {
            runner: {"CHORUS_RUNNER__REMOTE": f"openai=http://127.0.0.1:{port}"} for runner, port in self._ports.items()
        }

    def kill(self, runner: str) -> None:
        """Ends it the hard way, and starts another life of it."""
        started = self._started[runner]
        started.kill()
        self._processes.end(started)
        self._started[runner] = self._start(runner)

    def _start(self, runner: str) -> Started:
        argv = [sys.executable, _SERVER, str(self._ports[runner])]
        return self._processes.start(f"server-of-{runner}", argv, watches_parent=True)


async def remote_killed(times: int, draw: random.Random) -> Counter[str]:
    """Kills so many; half of the streams allow to go on from text. Returns what went wrong."""
    wrong: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as folder, processes_in(Path(folder)) as processes:
        servers = _Servers(processes)
        shape = Shape(runners=_RUNNERS, runner=None, own=servers.own)
        mesh = Mesh(processes, shape)
        async with mesh.client() as client:
            for number in range(1, times + 1):
                await mesh.until_all_serve()
                allowed = bool(number % 2)
                ended = await _one(client, servers, allowed, draw.randrange(2, WORDS // 2))
                wrong[ended] += bool(ended)
                say(f"remote {number}/{times}: {ended or 'ended as it must'}")
    return +wrong


async def _one(client: MeshClient, servers: _Servers, allowed: bool, after: int) -> str:
    """What is wrong with the end of one stream, whose server is killed after so many pieces; empty where nothing is."""
    runner, text, pieces, from_text = "", "", 0, False
    killed = False
    try:
        async with client.generate(replace(ask("say words: "), allow_text_resume=allowed)) as generation:
            async for event in generation:
                if isinstance(event, StartedAt):
                    runner = event.origin.runner_id
                elif isinstance(event, AttemptChanged):
                    from_text = event.from_text
                elif isinstance(event, TokenDelta):
                    text, pieces = text + event.text, pieces + 1
                    if pieces >= after and not killed:
                        killed = True
                        await asyncio.to_thread(servers.kill, runner)
    except ChorusError as error:
        if allowed:
            return f"failed though it might go on from text ({error.message})"
        right = isinstance(error, UnavailableError) and error.metadata.get("delivered_tokens") == str(pieces)
        return "" if right and _WHOLE.startswith(text) else f"ended as {error.reason} after {pieces} pieces"
    if not allowed:
        return "an answer that was cut off ended as a success"
    return "" if from_text and text == _WHOLE else f"went on wrongly: {text[:80]}..., from text: {from_text}"
