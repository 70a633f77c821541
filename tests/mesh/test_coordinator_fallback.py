"""Another model answers in place of one that nobody can serve, where the caller allows it, and says so."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from chorus.client import Fallback, MeshClient, StartedAt, Substitution
from chorus.core.errors import UnknownModelError
from chorus.core.events import Event, EventFilter, EventKind, RequestSubstituted
from chorus.core.fleet.records import Tier
from chorus.core.generation import Finished, TokenDelta
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine, FakeModel, fake_artifact
from chorus.testing.mesh import InProcessMesh

LEAVE = Fallback(similar_model=True)
ASKED, ALIKE = "fake-1b", "alike"


async def events_of(client: MeshClient) -> list[str]:
    """The kinds of event of an answer to a question for the model, in order, with what was substituted."""
    told = []
    async with client.generate("echo:hi", model=ASKED, fallback=LEAVE) as generation:
        async for event in generation:
            if isinstance(event, Substitution):
                told.append(f"{event.requested_model}->{event.model} {event.reason}")
            elif isinstance(event, StartedAt):
                told.append(f"started {event.started.model}")
            elif isinstance(event, TokenDelta | Finished):
                told.append(type(event).__name__)
    return list(dict.fromkeys(told))


async def test_a_model_that_fails_is_barred_and_then_gone_is_answered_for_by_another(
    certificates: MeshCertificates,
) -> None:
    asked = FakeEngine()
    others = FakeEngine(
        [
            FakeModel(fake_artifact("large.gguf", family="large", tier=Tier.LARGE)),
            FakeModel(fake_artifact("alike.gguf", family=ALIKE)),
        ]
    )
    settings = {"breaker_failures": 1, "breaker_open_s": 3600.0}
    async with (
        asyncio.timeout(60),
        InProcessMesh(runners=[asked, others], certificates=certificates, coordinator=settings) as mesh,
    ):
        client, direct = mesh.client(), mesh.client(direct="always")
        rest = [f"started {ALIKE}", "TokenDelta", "Finished"]
        # Its only runner fails before the first token.
        asked.fail_next()
        assert await events_of(client) == [f"{ASKED}->{ALIKE} ENGINE_FAILED", *rest]
        # That opened its breaker. With leave nobody probes it; without, somebody does.
        assert await events_of(client) == [f"{ASKED}->{ALIKE} RUNNERS_UNAVAILABLE", *rest]
        plain = await client.complete("echo:hi", model=ASKED)
        assert (plain.model, plain.substitution) == (ASKED, None)
        # What it was like is remembered when it is gone.
        await mesh.runners[0].stop(0.0)
        await mesh.until(lambda directory: directory.get("runner-1") is None)
        assert await events_of(client) == [f"{ASKED}->{ALIKE} UNKNOWN_MODEL", *rest]
        assert await events_of(direct) == [f"{ASKED}->{ALIKE} UNKNOWN_MODEL", *rest]
        with pytest.raises(UnknownModelError, match=ALIKE):
            await client.complete("echo:hi", model=ASKED)
        answer = await client.complete("echo:hi", model=ASKED, fallback=LEAVE)
        assert answer.substitution == Substitution(ASKED, ALIKE, "UNKNOWN_MODEL")
        # Events tell everybody whose business it is.
        condition = EventFilter(kinds=frozenset({EventKind.REQUEST_SUBSTITUTED}))
        seen: list[Event] = []
        async with aclosing(client.watch_events(condition, since_s=60.0)) as news:
            async for one in news:
                event = getattr(one, "event", None)
                if isinstance(event, Event):
                    seen.append(event)
                if len(seen) == 5:
                    break
        assert {event.subject.model for event in seen} == {ALIKE}
        assert all(isinstance(event.detail, RequestSubstituted) for event in seen)


async def test_a_coordinator_that_was_restarted_remembers_what_models_were_like_and_when_they_are_asked_for(
    certificates: MeshCertificates, tmp_path: Path
) -> None:
    others = FakeEngine(
        [
            FakeModel(fake_artifact("large.gguf", family="large", tier=Tier.LARGE)),
            FakeModel(fake_artifact("alike.gguf", family=ALIKE)),
        ]
    )
    settings = {"default_model": "large", "memory_file": tmp_path / "memory.sqlite"}
    async with (
        asyncio.timeout(60),
        InProcessMesh(runners=[FakeEngine(), others], certificates=certificates, coordinator=settings) as mesh,
    ):
        client = mesh.client()
        assert (await client.complete("echo:hi", model=ASKED)).model == ASKED
        await mesh.runners[0].stop(0.0)
        await mesh.until(lambda directory: directory.get("runner-1") is None)
        await mesh.restart_coordinator()
        await mesh.until(lambda directory: directory.get("runner-2") is not None)
        assert (await events_of(client))[0] == f"{ASKED}->{ALIKE} UNKNOWN_MODEL"
        assert (await client.complete("echo:hi", model="never", fallback=LEAVE)).model == "large"
        patterns = mesh.coordinators[0]._loading.patterns.remembered(time.time())
        assert ASKED in {pattern.model for pattern in patterns}
