"""What a mesh tells of itself: watched over real TLS, resumed, filtered by who asks, and posted to a webhook."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest

from chorus.client import CoordinatorLost, CoordinatorWatched, EventNews, EventsMissing, MeshClient, SeenEvent
from chorus.config import Endpoint
from chorus.config.secrets import read_secret
from chorus.core.errors import ConfigError, EngineError, PermissionDeniedError, UnknownModelError
from chorus.core.events import (
    AttemptFailed,
    AttemptResumed,
    Event,
    EventFilter,
    EventKind,
    LostReason,
    Outcome,
    RequestAdmitted,
    RequestFinished,
    RequestRefused,
    Subject,
)
from chorus.core.events.log import DEFAULT_CAPACITY
from chorus.core.fleet.records import EngineKind
from chorus.core.generation import GenerationRequest, Requirements, TextPrompt, TokenDelta
from chorus.core.identity import Role
from chorus.core.placement import Work
from chorus.testing.blackhole import Blackhole
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace
from tests.mesh.test_direct import Direct, read, spec

REQUESTS = frozenset(kind for kind in EventKind if kind.startswith("request_"))


def raw(text: str = "echo:hello", *runner_ids: str, model: str = "") -> GenerationRequest:
    return GenerationRequest(model, TextPrompt(text), requirements=Requirements(runner_ids=runner_ids))


class Reader:
    """Reads a client's news, and skips those of connections."""

    def __init__(
        self, client: MeshClient, condition: EventFilter | None = None, since_s: float | None = 3600.0
    ) -> None:
        self.news: AsyncGenerator[EventNews] = client.watch_events(condition, since_s=since_s)

    async def next(self) -> Event:
        async for item in self.news:
            if isinstance(item, SeenEvent):
                return item.event
        raise AssertionError("the news ended")

    async def until(self, kind: EventKind) -> list[Event]:
        """The events up to and including one of that kind."""
        seen: list[Event] = []
        while not seen or seen[-1].kind is not kind:
            seen.append(await self.next())
        return seen

    async def close(self) -> None:
        await self.news.aclose()


async def test_a_request_is_told_from_its_admission_to_its_figures(certificates: MeshCertificates) -> None:
    async with InProcessMesh(certificates=certificates) as mesh:
        client = mesh.client()
        completion = await client.complete(raw())
        reader = Reader(client)
        seen = await reader.until(EventKind.REQUEST_FINISHED)
        await reader.close()
        kinds = [event.kind for event in seen]
        assert kinds == [
            EventKind.NODE_JOINED,
            EventKind.RUNNER_JOINED,
            EventKind.REQUEST_ADMITTED,
            EventKind.REQUEST_FINISHED,
        ]
        assert [event.sequence for event in seen] == [1, 2, 3, 4]
        assert seen[1].subject.runner_id == "runner-1"
        assert seen[1].subject.node_id == "node-of-runner-1"
        admitted, finished = seen[2], seen[3]
        assert admitted.subject.request_id == finished.subject.request_id == completion.request_id
        assert admitted.subject.caller.endswith("/client/client-1")
        assert isinstance(admitted.detail, RequestAdmitted)
        detail = finished.detail
        assert isinstance(detail, RequestFinished)
        assert (detail.work, detail.outcome, detail.engine) == (Work.GENERATE, Outcome.COMPLETED, EngineKind.LOCAL)
        assert (detail.prompt_tokens, detail.output_tokens) == (
            completion.usage.prompt_tokens,
            completion.usage.completion_tokens,
        )
        assert detail.first_token_s is not None
        assert 0 <= detail.queue_s <= detail.first_token_s <= detail.total_s
        assert (finished.subject.runner_id, finished.subject.model) == ("runner-1", completion.model)


async def test_refusals_and_failures_say_why(certificates: MeshCertificates) -> None:
    engine = FakeEngine()
    async with InProcessMesh(runners=[engine], certificates=certificates, coordinator={"max_attempts": 1}) as mesh:
        client = mesh.client()
        reader = Reader(client, EventFilter(kinds=REQUESTS | {EventKind.ATTEMPT_FAILED}))
        with pytest.raises(UnknownModelError):
            await client.complete(raw(model="nobody-has-it"))
        refused = (await reader.until(EventKind.REQUEST_REFUSED))[-1]
        assert isinstance(refused.detail, RequestRefused)
        assert refused.detail.reason == "UNKNOWN_MODEL"
        assert refused.subject.model == "nobody-has-it"
        engine.fail_next(error=EngineError("it broke"))
        with pytest.raises(EngineError):
            await client.complete(raw())
        _, failed, finished = await reader.until(EventKind.REQUEST_FINISHED)
        assert isinstance(failed.detail, AttemptFailed)
        assert (failed.detail.attempt, failed.detail.reason, failed.detail.begun) == (1, "ENGINE_FAILED", False)
        assert isinstance(finished.detail, RequestFinished)
        assert (finished.detail.outcome, finished.detail.reason) == (Outcome.FAILED, "ENGINE_FAILED")
        assert "it broke" in finished.detail.message
        await reader.close()


async def test_the_other_kinds_of_work_are_told_too(certificates: MeshCertificates) -> None:
    async with InProcessMesh(certificates=certificates) as mesh:
        client = mesh.client()
        await client.embed("one")
        await client.rerank("which", ["this", "that"])
        await client.count_tokens(raw())
        reader = Reader(client, EventFilter(kinds=frozenset({EventKind.REQUEST_FINISHED})))
        details = [(await reader.next()).detail for _ in range(3)]
        await reader.close()
        assert [detail.work for detail in details if isinstance(detail, RequestFinished)] == [
            Work.EMBED,
            Work.RERANK,
            Work.COUNT_TOKENS,
        ]


async def test_who_goes_away_is_told_as_cancelled(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[FakeEngine(pace=pace)], certificates=certificates) as mesh:
        client = mesh.client()
        pace.release(1)
        async with client.generate(raw("tell me")) as generation:
            async for event in generation:
                if isinstance(event, TokenDelta):
                    break
        reader = Reader(client, EventFilter(kinds=frozenset({EventKind.REQUEST_FINISHED})))
        finished = (await reader.next()).detail
        await reader.close()
        assert isinstance(finished, RequestFinished)
        assert (finished.outcome, finished.output_tokens) == (Outcome.CANCELLED, 1)


async def test_an_answer_that_goes_on_elsewhere(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine()
    async with InProcessMesh(runners=engines, certificates=certificates) as mesh:
        for engine in engines:
            engine.fail_next(before=3)
        client = mesh.client()
        await client.complete(raw("tell me"))
        reader = Reader(client, EventFilter(kinds=frozenset({EventKind.ATTEMPT_RESUMED, EventKind.REQUEST_FINISHED})))
        seen = await reader.until(EventKind.REQUEST_FINISHED)
        await reader.close()
        resumed = seen[0].detail
        assert isinstance(resumed, AttemptResumed)
        assert (resumed.attempt, resumed.reason, resumed.output_tokens) == (3, "ENGINE_FAILED", 3)


async def test_what_a_client_asks_a_runner_itself_is_told_like_all_else(certificates: MeshCertificates) -> None:
    async with InProcessMesh(certificates=certificates) as mesh, Direct(mesh) as kim:
        placed = await kim.place(spec())
        events = await read(kim.generate(placed, spec()))
        tokens = sum(len(event.delta.token_ids) for event in events)
        reader = Reader(mesh.client(name="kim"), EventFilter(kinds=REQUESTS))
        admitted, finished = await reader.next(), await reader.next()
        await reader.close()
        assert admitted.kind is EventKind.REQUEST_ADMITTED
        assert isinstance(finished.detail, RequestFinished)
        assert (finished.detail.outcome, finished.detail.output_tokens) == (Outcome.COMPLETED, tokens)
        assert finished.subject.runner_id == "runner-1"
        assert finished.subject.request_id == admitted.subject.request_id


async def test_breakers(certificates: MeshCertificates) -> None:
    engine = FakeEngine()
    settings = {"breaker_failures": 1, "breaker_open_s": 1e-6, "max_attempts": 1}
    async with InProcessMesh(runners=[engine], certificates=certificates, coordinator=settings) as mesh:
        client = mesh.client()
        engine.fail_next()
        with pytest.raises(EngineError):
            await client.complete(raw())
        await client.complete(raw())
        breakers = EventFilter(kinds=frozenset(kind for kind in EventKind if kind.startswith("breaker_")))
        reader = Reader(client, breakers)
        seen = await reader.until(EventKind.BREAKER_CLOSED)
        await reader.close()
        assert [event.kind for event in seen] == [
            EventKind.BREAKER_OPENED,
            EventKind.BREAKER_HALF_OPEN,
            EventKind.BREAKER_CLOSED,
        ]
        assert {(event.subject.runner_id, event.subject.request_id) for event in seen} == {("runner-1", "")}
        assert all(event.subject.model and event.subject.artifact for event in seen)


async def test_runners_that_go(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[FakeEngine(pace=pace), FakeEngine()], certificates=certificates) as mesh:
        reader = Reader(mesh.client())
        await mesh.kill_runner(1)
        lost = await reader.until(EventKind.NODE_LOST)
        assert lost[-1].subject.node_id == "node-of-runner-2"
        assert lost[-2].kind is EventKind.RUNNER_LOST
        assert EventKind.RUNNER_UNREACHABLE in [event.kind for event in lost]
        answer = asyncio.create_task(mesh.client().complete(raw("tell me", "runner-1")))
        await pace.waiting(1)
        leaving = asyncio.create_task(mesh.runners[0].stop(20.0))
        draining = (await reader.until(EventKind.RUNNER_DRAINING))[-1]
        pace.release_all()
        gone = (await reader.until(EventKind.RUNNER_LOST))[-1]
        assert draining.subject.runner_id == gone.subject.runner_id == "runner-1"
        await reader.close()
        await asyncio.gather(answer, leaving)


async def test_clients_see_their_own_requests_and_admins_everybodys(certificates: MeshCertificates) -> None:
    async with InProcessMesh(certificates=certificates) as mesh:
        ann, ben, admin = mesh.client(name="ann"), mesh.client(name="ben"), mesh.client(role=Role.ADMIN, name="boss")
        await ann.complete(raw())
        await ben.complete(raw())
        ended = frozenset({EventKind.REQUEST_FINISHED, EventKind.RUNNER_JOINED})
        found: list[list[str]] = []
        for client in (ann, ben, admin):
            reader = Reader(client, EventFilter(kinds=ended))
            seen = [await reader.next(), await reader.next()]
            await reader.close()
            found.append([event.subject.caller.rpartition("/")[2] for event in seen])
        assert found == [["", "ann"], ["", "ben"], ["", "ann"]]
        reader = Reader(admin, EventFilter(kinds=ended, caller="ben"))
        assert (await reader.next()).subject.caller.endswith("/ben")
        await reader.close()


async def test_a_reader_whose_connection_broke_goes_on_where_it_was(certificates: MeshCertificates) -> None:
    async with InProcessMesh(certificates=certificates) as mesh:
        async with Blackhole() as way:
            way.leads_to = int(mesh.coordinators[0].address.rpartition(":")[2])
            watcher = MeshClient(
                [Endpoint("127.0.0.1", way.port, "coordinator-1")],
                identity=certificates.identity(Role.CLIENT, "client-1"),
            )
            reader = Reader(watcher, EventFilter(kinds=frozenset({EventKind.REQUEST_FINISHED})))
            ids = []
            for _ in range(3):
                ids.append((await mesh.client().complete(raw())).request_id)
                assert (await reader.next()).subject.request_id == ids[-1]
                way.cut()
            await reader.close()
            await watcher.aclose()
        assert len(set(ids)) == 3


async def test_another_life_of_the_coordinator_is_told_as_a_gap(certificates: MeshCertificates) -> None:
    async with InProcessMesh(certificates=certificates) as mesh:
        client = mesh.client()
        async with aclosing(client.watch_events(since_s=3600.0)) as news:
            seen: list[EventNews] = []
            while not any(isinstance(item, SeenEvent) for item in seen):
                seen.append(await anext(news))
            assert isinstance(seen[0], CoordinatorWatched)
            await mesh.restart_coordinator()
            while not isinstance(seen[-1], EventsMissing):
                seen.append(await anext(news))
            assert seen[-1].reason is LostReason.OTHER_EPOCH
            assert [type(item) for item in seen[-3:-1]] == [CoordinatorLost, CoordinatorWatched]
            after = await anext(news)
            assert isinstance(after, SeenEvent)
            assert after.event.sequence == 1


async def test_who_reads_too_slowly_loses_events_and_is_told(certificates: MeshCertificates) -> None:
    async with InProcessMesh(certificates=certificates) as mesh:
        board = mesh.coordinators[0].events
        async with aclosing(mesh.client().watch_events()) as news:
            assert isinstance(await anext(news), CoordinatorWatched)
            before = board.log.last
            # Within one turn of the loop: the ring goes round under the reader.
            for _ in range(DEFAULT_CAPACITY + 2):
                board.note(EventKind.NODE_JOINED, Subject(node_id="n"))
            missing = await anext(news)
            assert isinstance(missing, EventsMissing)
            assert (missing.reason, missing.count) == (LostReason.LAGGED, 2)
            for sequence in range(before + 3, board.log.last + 1):
                item = await anext(news)
                assert isinstance(item, SeenEvent)
                assert item.event.sequence == sequence


async def test_what_may_not_be_watched_is_an_error_and_no_endless_loop(certificates: MeshCertificates) -> None:
    async with InProcessMesh(certificates=certificates) as mesh:
        runner = mesh.client(role=Role.RUNNER, name="runner-1")
        async with aclosing(runner.watch_events()) as news:
            with pytest.raises(PermissionDeniedError):
                await anext(news)


# --- webhooks -------------------------------------------------------------------------------------------------------


class Receiver:
    """A real HTTP server in a thread; `answers` are the statuses of its first answers, 200 after them."""

    def __init__(self, answers: list[int]) -> None:
        self.posts: Queue[tuple[dict[str, str], bytes]] = Queue()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.posts.put(({key.lower(): value for key, value in self.headers.items()}, body))
                self.send_response(answers.pop(0) if answers else 200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    async def post(self) -> tuple[dict[str, str], Any]:
        """The next request: its headers, and its content."""
        headers, body = await asyncio.to_thread(self.posts.get, timeout=20.0)
        self.body = body
        return headers, json.loads(body)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def receiver() -> Iterator[Callable[..., Receiver]]:
    made: list[Receiver] = []

    def make(*answers: int) -> Receiver:
        made.append(Receiver(list(answers)))
        return made[-1]

    yield make
    for one in made:
        one.close()


async def test_a_webhook_gets_alerts_signed_and_again_until_they_arrive(
    certificates: MeshCertificates, receiver: Callable[..., Receiver], tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    hook = receiver(503, 200)
    settings = {"webhooks": [hook.url], "webhook_secret_file": secret}
    async with InProcessMesh(runners=2, certificates=certificates, coordinator=settings) as mesh:
        await mesh.client().complete(raw())
        await mesh.kill_runner(1)
        first, content = await hook.post()
        again, repeated = await hook.post()
        assert repeated == content, "the first try was refused"
        assert first["chorus-delivery"] == again["chorus-delivery"]
        at, _, digest = again["chorus-signature"].removeprefix("t=").partition(",v1=")
        assert digest == hmac.new(b"s3cret", f"{at}.".encode() + hook.body, hashlib.sha256).hexdigest()
        events = list(content["events"])
        while not any(event["kind"] == "EVENT_KIND_NODE_LOST" for event in events):
            events += (await hook.post())[1]["events"]
        kinds = {event["kind"] for event in events}
        assert kinds == {"EVENT_KIND_RUNNER_UNREACHABLE", "EVENT_KIND_RUNNER_LOST", "EVENT_KIND_NODE_LOST"}
        assert {event.get("runner_id") for event in events} == {"runner-2", None}
        assert (content["coordinator"], content["lost"]) == ("coordinator-1", 0)


async def test_a_webhook_of_chosen_kinds_is_told_of_nothing_else_and_of_what_it_missed(
    certificates: MeshCertificates, receiver: Callable[..., Receiver]
) -> None:
    hook = receiver(400)
    settings = {"webhooks": [hook.url], "webhook_kinds": ["request-finished"]}
    async with InProcessMesh(certificates=certificates, coordinator=settings) as mesh:
        client = mesh.client()
        given_up = await client.complete(raw())
        _, content = await hook.post()
        assert [event["request_id"] for event in content["events"]] == [given_up.request_id]
        board = mesh.coordinators[0].events
        for _ in range(DEFAULT_CAPACITY + 1):
            board.note(EventKind.NODE_JOINED, Subject(node_id="n"))
        completion = await client.complete(raw())
        events, lost = [], 0
        while not events:
            _, content = await hook.post()
            events, lost = content["events"], lost + content["lost"]
        assert lost > 0
        assert [event["request_id"] for event in events] == [completion.request_id]
        assert events[0]["request_finished"]["outcome"] == "OUTCOME_COMPLETED"


async def test_a_webhook_that_is_not_there_holds_nobody_up(certificates: MeshCertificates) -> None:
    settings = {"webhooks": ["http://127.0.0.1:1/hook"], "webhook_kinds": ["request-finished"]}
    async with InProcessMesh(certificates=certificates, coordinator=settings) as mesh:
        for _ in range(3):
            assert (await mesh.client().complete(raw())).text == "hello"


def test_a_secret_that_is_none(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text(" \n")
    with pytest.raises(ConfigError, match="webhook_secret_file"):
        read_secret(empty, key="coordinator.webhook_secret_file")
    with pytest.raises(ConfigError, match="No such file"):
        read_secret(tmp_path / "none", key="coordinator.webhook_secret_file")
