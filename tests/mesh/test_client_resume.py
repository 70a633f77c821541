"""A client's generations survive their coordinator, over real TLS: whoever goes on, no token is lost or doubled."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from chorus.client import AttemptChanged, ClientEvent, Generation, MeshClient, StartedAt, SyncMeshClient, generating
from chorus.config import ChorusConfig, Endpoint
from chorus.core.errors import ChorusError, DeadlineExceededError, EngineError, UnavailableError
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.records import Feature
from chorus.core.generation import (
    DeliveredChoice,
    Finished,
    GenerationRequest,
    PromptScored,
    Sampling,
    StopConditions,
    TextPrompt,
    TokenDelta,
)
from chorus.core.identity import Role
from chorus.core.resilience.resuming import ResumePolicy
from chorus.testing.blackhole import Blackhole
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FAKE_FEATURES, FakeEngine, FakeModel
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace

LONG_S = 40.0


def mesh_of(certificates: MeshCertificates, *engines: FakeEngine, coordinators: int = 2) -> InProcessMesh:
    return InProcessMesh(runners=engines, coordinators=coordinators, certificates=certificates)


def raw(text: str = "tell me", **fields: object) -> GenerationRequest:
    return GenerationRequest(model="", prompt=TextPrompt(text), **fields)  # type: ignore[arg-type]


def deltas(events: list[ClientEvent]) -> list[TokenDelta]:
    return [event for event in events if isinstance(event, TokenDelta)]


def parts(events: list[ClientEvent], choice: int) -> list[TokenDelta]:
    return [delta for delta in deltas(events) if delta.choice == choice]


def text(events: list[ClientEvent]) -> str:
    return "".join(delta.text for delta in deltas(events))


def changes(events: list[ClientEvent]) -> list[AttemptChanged]:
    return [event for event in events if isinstance(event, AttemptChanged)]


async def until_token(generation: Generation, count: int) -> list[ClientEvent]:
    events: list[ClientEvent] = []
    while len(deltas(events)) < count:
        events.append(await anext(generation))
    return events


async def collect(generation: Generation) -> list[ClientEvent]:
    return [event async for event in generation]


async def failure(generation: Generation) -> ChorusError:
    with pytest.raises(ChorusError) as caught:
        await collect(generation)
    return caught.value


def asked(mesh: InProcessMesh) -> int:
    """The coordinator that has the one generation."""
    (index,) = (index for index, service in enumerate(mesh.coordinators) if service._admission.running)
    return index


async def undisturbed(certificates: MeshCertificates, request: GenerationRequest) -> list[ClientEvent]:
    async with mesh_of(certificates, FakeEngine(), coordinators=1) as mesh:
        return await collect(mesh.client().generate(request))


def check_contract(events: list[ClientEvent]) -> None:
    """Started once, each choice's indexes without gap and repeat, Finished last and with the whole."""
    assert sum(isinstance(event, StartedAt) for event in events) == 1
    assert isinstance(events[-1], Finished)
    counts = Counter[int]()
    for delta in deltas(events):
        assert delta.index == counts[delta.choice]
        counts[delta.choice] += len(delta.token_ids)
    finished = events[-1]
    assert {outcome.choice: outcome.token_count for outcome in finished.choices} == counts
    assert finished.usage.completion_tokens == counts.total()


ASKED = {
    "plain": raw(),
    "several choices": raw(choice_count=3),
    "half characters": raw("echo:grüße 👍 an alle"),
    "a withheld stop string": raw("echo:one two STOP three", stop=StopConditions(strings=("STOP",))),
    "a limit": raw(stop=StopConditions(max_tokens=17)),
    "scores": raw(logprobs=2, prompt_logprobs=1),
    "a seed": raw(sampling=Sampling(seed=2**64 - 1)),
}


@pytest.mark.parametrize("request_", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("before", [1, 4, 11])
async def test_the_answer_is_that_of_an_undisturbed_mesh(
    certificates: MeshCertificates, request_: GenerationRequest, before: int
) -> None:
    expected = await undisturbed(certificates, request_)
    pace = ManualPace()
    async with mesh_of(certificates, FakeEngine(pace=pace)) as mesh:
        async with mesh.client().generate(request_) as generation:
            pace.release(before)
            events = await until_token(generation, before)
            lost = asked(mesh)
            await mesh.kill_coordinator(lost)
            pace.release_all()
            events += await collect(generation)
        endpoints = mesh.coordinator_endpoints()
    check_contract(events)
    (changed,) = changes(events)
    assert (changed.attempt, changed.reason, changed.from_text) == (2, "UNAVAILABLE", False)
    assert (changed.runner_id, changed.coordinator) == ("runner-1", endpoints[1 - lost])
    assert changed.gap_s >= 0.0
    for choice in range(request_.choice_count):
        assert parts(events, choice) == parts(expected, choice)
    assert [event for event in events if isinstance(event, PromptScored)] == [
        event for event in expected if isinstance(event, PromptScored)
    ]
    finished, whole = events[-1], expected[-1]
    assert isinstance(finished, Finished)
    assert isinstance(whole, Finished)
    assert (finished.choices, finished.usage) == (whole.choices, whole.usage)
    assert finished.timings.decode_s >= changed.gap_s


async def test_a_coordinator_that_is_told_to_stop_is_left(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with mesh_of(certificates, FakeEngine(pace=pace)) as mesh, mesh.client().generate(raw()) as generation:
        pace.release(5)
        events = await until_token(generation, 5)
        stopping = asyncio.create_task(mesh.coordinators[asked(mesh)].stop(0.0))
        pace.release_all()
        events += await collect(generation)
        await stopping
    check_contract(events)


async def test_one_by_one_until_its_end(certificates: MeshCertificates) -> None:
    expected = await undisturbed(certificates, raw())
    async with (
        mesh_of(certificates, FakeEngine(tokens_per_second=30), coordinators=4) as mesh,
        mesh.client().generate(raw()) as generation,
    ):
        events: list[ClientEvent] = []
        for _ in range(3):
            events += await until_token(generation, 3)
            await mesh.kill_coordinator(asked(mesh))
        events += await collect(generation)
    check_contract(events)
    assert text(events) == text(expected)
    assert [change.attempt for change in changes(events)] == [2, 3, 4]
    assert len({change.coordinator for change in changes(events)}) == 3


async def test_before_the_first_token_another_begins_anew(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with mesh_of(certificates, FakeEngine(pace=pace)) as mesh, mesh.client().generate(raw()) as generation:
        answer = asyncio.create_task(collect(generation))
        await pace.waiting(1)
        await mesh.kill_coordinator(asked(mesh))
        await pace.waiting(1)
        pace.release_all()
        events = await answer
    check_contract(events)
    assert not changes(events)


async def test_the_only_coordinator_is_waited_for(certificates: MeshCertificates) -> None:
    expected = await undisturbed(certificates, raw())
    pace = ManualPace()
    async with (
        mesh_of(certificates, FakeEngine(pace=pace), coordinators=1) as mesh,
        mesh.client().generate(raw()) as generation,
    ):
        pace.release(5)
        events = await until_token(generation, 5)
        rest = asyncio.create_task(collect(generation))
        await mesh.kill_coordinator()
        await mesh.restart_coordinator()
        pace.release_all()
        events += await rest
    check_contract(events)
    assert text(events) == text(expected)
    assert len(changes(events)) == 1


async def test_it_ends_when_no_coordinator_comes(
    certificates: MeshCertificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generating, "POLICY", ResumePolicy(wait_s=0.3))
    pace = ManualPace()
    async with (
        mesh_of(certificates, FakeEngine(pace=pace), coordinators=1) as mesh,
        mesh.client().generate(raw()) as generation,
    ):
        pace.release(5)
        await until_token(generation, 5)
        await mesh.kill_coordinator()
        error = await failure(generation)
    assert isinstance(error, UnavailableError)
    assert "broke off after 5 tokens" in error.message
    assert error.metadata["delivered_tokens"] == "5"


async def test_time_goes_on_over_all_attempts(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with (
        mesh_of(certificates, FakeEngine(pace=pace)) as mesh,
        mesh.client().generate(raw(), timeout_s=1.0) as generation,
    ):
        pace.release(5)
        await until_token(generation, 5)
        await mesh.kill_coordinator(asked(mesh))
        error = await failure(generation)
    assert isinstance(error, DeadlineExceededError)
    assert "1 s" in error.message


async def test_where_every_coordinator_gives_up_it_is_told(certificates: MeshCertificates) -> None:
    engine = FakeEngine()
    async with mesh_of(certificates, engine) as mesh:
        engine.fail_next(before=3, times=50)
        with pytest.raises(EngineError) as caught:
            await mesh.client().complete(raw())
        assert 40 <= len(engine.faults) < 48  # some attempts by each of the coordinators
    assert caught.value.metadata["delivered_tokens"] == "3"


async def test_what_the_caller_had_elsewhere_is_kept(certificates: MeshCertificates) -> None:
    expected = await undisturbed(certificates, raw())
    had = tuple(token for delta in deltas(expected)[:6] for token in delta.token_ids)
    pace = ManualPace()
    async with (
        mesh_of(certificates, FakeEngine(pace=pace)) as mesh,
        mesh.client().generate(raw(resume=(DeliveredChoice(0, had),))) as generation,
    ):
        pace.release(5)
        events = await until_token(generation, 5)
        await mesh.kill_coordinator(asked(mesh))
        pace.release_all()
        events += await collect(generation)
    assert text(events) == "".join(delta.text for delta in deltas(expected)[6:])
    assert [delta.index for delta in deltas(events)] == list(range(6, len(deltas(expected))))
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.usage.completion_tokens == len(deltas(expected))


# --- frozen and cut off ---------------------------------------------------------------------------------------------


async def test_a_coordinator_that_is_cut_off_is_left_and_delivers_nothing_stale(
    certificates: MeshCertificates,
) -> None:
    expected = await undisturbed(certificates, raw())
    pace = ManualPace()
    async with mesh_of(certificates, FakeEngine(pace=pace)) as mesh, AsyncExitStack() as stack:
        ways = [await stack.enter_async_context(Blackhole()) for _ in mesh.coordinators]
        for way, service in zip(ways, mesh.coordinators, strict=True):
            way.leads_to = int(service.address.rpartition(":")[2])
        endpoints = [f"coordinator-{number}@127.0.0.1:{way.port}" for number, way in enumerate(ways, start=1)]
        identity = certificates.identity(Role.CLIENT, "client-1")
        client = MeshClient([Endpoint.parse(text) for text in endpoints], identity=identity)
        async with client, client.generate(raw()) as generation:
            pace.release(5)
            events = await until_token(generation, 5)
            cut = asked(mesh)
            ways[cut].shut()
            # Both attempts want tokens now: what the old one says does not arrive until the way is open again.
            rest = asyncio.create_task(until_token(generation, 4))
            await pace.waiting(2)
            pace.release(8)
            events += await rest
            ways[cut].open()
            pace.release_all()
            events += await collect(generation)
    check_contract(events)
    assert text(events) == text(expected)
    assert [change.coordinator for change in changes(events)] == [endpoints[1 - cut]]


async def test_one_that_does_not_answer_at_all_is_passed_over(certificates: MeshCertificates) -> None:
    async with mesh_of(certificates, FakeEngine(), coordinators=1) as mesh, Blackhole() as way:
        way.leads_to = int(mesh.coordinators[0].address.rpartition(":")[2])
        way.shut()
        endpoints = [f"coordinator-1@127.0.0.1:{way.port}", *mesh.coordinator_endpoints()]
        for _ in range(2):  # whoever is asked first
            async with MeshClient(
                [Endpoint.parse(text) for text in endpoints], identity=certificates.identity(Role.CLIENT, "client-1")
            ) as client:
                many = [client.complete(raw("echo:hello")) for _ in range(2)]
                assert [answer.text for answer in await asyncio.gather(*many)] == ["hello", "hello"]
                assert len((await client.embed(["a", "b"])).embeddings) == 2


# --- engines without token ids --------------------------------------------------------------------------------------

_TEXT_ONLY = FakeModel(features=FAKE_FEATURES - {Feature.TOKEN_IDS, Feature.RESUME})


@pytest.mark.parametrize("allowed", [False, True])
async def test_without_token_ids_it_goes_on_from_text_if_the_caller_allows_it(
    certificates: MeshCertificates, allowed: bool
) -> None:
    pace = ManualPace()
    asked_for = raw("echo:abcdef", allow_text_resume=allowed)
    async with (
        mesh_of(certificates, FakeEngine([_TEXT_ONLY], pace=pace)) as mesh,
        mesh.client().generate(asked_for) as generation,
    ):
        pace.release(3)
        events = await until_token(generation, 3)
        await mesh.kill_coordinator(asked(mesh))
        pace.release_all()
        if not allowed:
            error = await failure(generation)
            assert isinstance(error, UnavailableError)
            assert "without token ids" in error.message
            return
        events += await collect(generation)
    assert text(events) == "abcdef"
    (changed,) = changes(events)
    assert changed.from_text
    assert [delta.index for delta in deltas(events)] == list(range(len(deltas(events))))


# --- just started, just lost ----------------------------------------------------------------------------------------


async def test_a_coordinator_and_a_registry_that_were_just_started_do_not_say_that_nobody_is_there(
    certificates: MeshCertificates,
) -> None:
    async with mesh_of(certificates, FakeEngine(), coordinators=1) as mesh:
        await mesh.kill_coordinator()
        await mesh.restart_registry()
        await mesh.restart_coordinator()
        assert (await mesh.client().complete(raw("echo:hello"))).text == "hello"


async def test_a_request_whose_only_runner_is_lost_before_its_first_token_waits_for_another(
    certificates: MeshCertificates,
) -> None:
    pace = ManualPace()
    async with mesh_of(certificates, FakeEngine(pace=pace), coordinators=1) as mesh:
        answer = asyncio.create_task(mesh.client().complete(raw("echo:hello")))
        await pace.waiting(1)
        await mesh.kill_runner()
        await mesh.until(lambda directory: not is_reachable(directory, "runner-1"))
        await mesh.add_runner()
        assert (await answer).runner_id == "runner-2"


def is_reachable(directory: Directory, runner_id: str) -> bool:
    entry = directory.get(runner_id)
    return entry is not None and entry.reachable


# --- many ------------------------------------------------------------------------------------------------------------


async def test_requests_are_spread_over_coordinators_and_away_from_one_that_fails(
    certificates: MeshCertificates,
) -> None:
    pace = ManualPace()
    async with mesh_of(certificates, FakeEngine(pace=pace, slots=32)) as mesh:
        client = mesh.client()
        running = [asyncio.create_task(client.complete(raw(f"echo:{number}"))) for number in range(10)]
        await pace.waiting(10)
        assert [service._admission.running for service in mesh.coordinators] == [5, 5]
        await mesh.kill_coordinator(0)
        pace.release_all()
        assert [answer.text for answer in await asyncio.gather(*running)] == [str(number) for number in range(10)]


# --- without an event loop ------------------------------------------------------------------------------------------


def _stream(config: ChorusConfig, after_five: Callable[[], None]) -> list[ClientEvent]:
    events: list[ClientEvent] = []
    with SyncMeshClient(config) as client, client.generate(raw()) as generation:
        for event in generation:
            events.append(event)
            if len(deltas(events)) == 5 and isinstance(event, TokenDelta):
                after_five()
    return events


async def test_the_same_without_an_event_loop(certificates: MeshCertificates, tmp_path: Path) -> None:
    expected = await undisturbed(certificates, raw())
    pace = ManualPace()
    async with mesh_of(certificates, FakeEngine(pace=pace)) as mesh:
        loop = asyncio.get_running_loop()

        async def disturb() -> None:
            await mesh.kill_coordinator(asked(mesh))
            pace.release_all()

        pace.release(5)
        events = await asyncio.to_thread(
            _stream,
            mesh.client_config(tmp_path),
            lambda: asyncio.run_coroutine_threadsafe(disturb(), loop).result(LONG_S),
        )
    check_contract(events)
    assert text(events) == text(expected)
    assert len(changes(events)) == 1


# --- on the command line --------------------------------------------------------------------------------------------


async def test_who_asks_on_the_command_line_is_told_in_a_line(certificates: MeshCertificates, tmp_path: Path) -> None:
    pace = ManualPace()
    async with mesh_of(certificates, FakeEngine(pace=pace)) as mesh:
        config = mesh.client_config(tmp_path)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("CHORUS_")} | {
            "CHORUS_MESH__TRUST_DOMAIN": config.mesh.trust_domain,
            "CHORUS_MESH__CERTS_DIR": str(tmp_path),
            "CHORUS_CLIENT__IDENTITY": config.client.identity,
            "CHORUS_CLIENT__COORDINATORS": ",".join(mesh.coordinator_endpoints()),
            "XDG_CONFIG_HOME": str(tmp_path),
            "XDG_STATE_HOME": str(tmp_path),
        }
        command = (sys.executable, "-m", "chorus.cli.main", "ask", "--no-stats", "echo:one answer")
        process = await asyncio.create_subprocess_exec(
            *command, env=environ, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        pace.release(3)
        begun = await process.stdout.readexactly(3)
        lost = asked(mesh)
        await mesh.kill_coordinator(lost)
        pace.release_all()
        rest, told = await asyncio.gather(process.stdout.read(), process.stderr.read())
        assert await process.wait() == 0
    assert (begun + rest).decode() == "one answer\n"
    (line,) = told.decode().splitlines()
    other = mesh.coordinators[1 - lost].address
    assert line.startswith(f"the coordinator was lost; the one at {other} goes on where it stopped (")
