"""Direct mode over real sockets: tickets that are good, each that is not, and the coordinator's books of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest

from chorus.api.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from chorus.api.identity.v1 import ticket_pb2
from chorus.api.inference.v1 import generation_pb2
from chorus.api.runner.v1 import runner_pb2, runner_pb2_grpc
from chorus.core import errors
from chorus.core.errors import ChorusError, TicketError
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine, FakeModel
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace
from chorus.transport import open_channel
from chorus.transport.tickets import TicketSigner, TicketVerifier
from chorus.wire.errors import from_rpc_error
from tests.mesh.scripted_runner import ScriptedRunner
from tests.security.attackers import signed_by_a_leaf


def spec(text: str = "echo:hello", **fields: Any) -> generation_pb2.GenerationSpec:
    return generation_pb2.GenerationSpec(prompt=text, **fields)


class Direct:
    """A client that speaks the protocol itself, as one in another language would."""

    def __init__(self, mesh: InProcessMesh, name: str = "kim", role: Role = Role.CLIENT) -> None:
        self.mesh = mesh
        self._identity = mesh.certificates.identity(role, name)
        self._channels: list[grpc.aio.Channel] = []

    async def __aenter__(self) -> Direct:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

    def coordinator(self) -> Any:
        service = self.mesh.coordinators[0]
        server = self.mesh.certificates.id(Role.COORDINATOR, "coordinator-1")
        return coordinator_pb2_grpc.CoordinatorStub(self._open(service.address, server.dns_name))

    def runner(self, placed: coordinator_pb2.PlaceResponse) -> Any:
        return runner_pb2_grpc.ModelRunnerStub(self._open(placed.address, placed.server_name))

    async def place(self, asked: generation_pb2.GenerationSpec, **fields: Any) -> coordinator_pb2.PlaceResponse:
        found: coordinator_pb2.PlaceResponse = await self.coordinator().Place(
            coordinator_pb2.PlaceRequest(spec=asked, **fields), timeout=10
        )
        return found

    def generate(self, placed: coordinator_pb2.PlaceResponse, asked: generation_pb2.GenerationSpec) -> Any:
        request = runner_pb2.GenerateRequest(spec=asked, ticket=placed.ticket)
        return self.runner(placed).Generate(request, timeout=10)

    def _open(self, address: str, server: str) -> grpc.aio.Channel:
        channel = open_channel(address, identity=self._identity, server=server)
        self._channels.append(channel)
        return channel


async def read(call: Any) -> list[generation_pb2.GenerationEvent]:
    return [response.event async for response in call]


async def refusal(call: Any) -> ChorusError:
    with pytest.raises(grpc.RpcError) as caught:
        await (read(call) if hasattr(call, "__aiter__") else call)
    error = from_rpc_error(caught.value)
    if isinstance(error, TicketError):
        code = caught.value.code()  # type: ignore[attr-defined]
        again = (errors.TicketRunnerError, errors.TicketExpiredError, errors.TicketUsedError)
        expected = (
            grpc.StatusCode.FAILED_PRECONDITION if isinstance(error, again) else grpc.StatusCode.PERMISSION_DENIED
        )
        assert code is expected
    return error


class Books:
    """What a coordinator has counted."""

    def __init__(self, mesh: InProcessMesh) -> None:
        self._service = mesh.coordinators[0]
        self._metrics = mesh.coordinator_metrics[0]
        self._changed = asyncio.Event()
        granting: Any = self._service._granting
        settle = granting._settle

        def settled(closed: Any) -> None:
            settle(closed)
            self._changed.set()

        granting._settle = settled

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once the condition holds, looking when tickets may have been closed."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def closed(self, closing: str) -> float:
        return self._value("chorus_generation_tickets_total", closing=closing)

    def attempts(self, outcome: str) -> float:
        return self._value("chorus_generation_attempts_total", outcome=outcome)

    def tokens(self, kind: str) -> float:
        return self._value(f"chorus_generation_{kind}_tokens_total", model="fake-1b")

    @property
    def kept(self) -> tuple[int, int, int]:
        """Open tickets, admission's places, requests in flight at the first runner."""
        service = self._service
        return (
            service._granting.open,
            service._admission.running,
            service._placing._in_flight.running("runner-1"),
        )

    def _value(self, name: str, **labels: str) -> float:
        return self._metrics.get_sample_value(name, labels) or 0.0


# --- a ticket that is good ------------------------------------------------------------------------------------------


async def test_a_client_streams_from_the_runner_and_the_books_close(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[FakeEngine(pace=pace)], certificates=certificates) as mesh, Direct(mesh) as kim:
        books = Books(mesh)
        placed = await kim.place(spec())
        assert (placed.runner_id, placed.node_id) == ("runner-1", "node-of-runner-1")
        assert placed.incarnation == mesh.runners[0].presence.incarnation
        assert placed.expires_in.seconds == 10
        assert books.kept == (1, 1, 1)
        reading = asyncio.create_task(read(kim.generate(placed, spec())))
        await pace.waiting(1)
        assert books.kept == (1, 1, 1)
        pace.release_all()
        events = await reading
        assert "".join(event.delta.text for event in events) == "hello"
        assert events[-1].HasField("finished")
        started = next(event.started for event in events if event.HasField("started"))
        assert started.artifact == placed.artifact
        await books.until(lambda: books.kept == (0, 0, 0))
        assert (books.closed("ended"), books.attempts("OK")) == (1, 1)
        assert books.tokens("output") == sum(len(event.delta.token_ids) for event in events)
        assert books.tokens("prompt") == started.prompt_token_count


async def test_the_ticket_says_what_it_grants_and_who_granted_it(certificates: MeshCertificates) -> None:
    asked = spec(stop=generation_pb2.StopConditions(max_tokens=7), choice_count=2)
    async with InProcessMesh(runners=1, certificates=certificates) as mesh, Direct(mesh) as kim:
        placed = await kim.place(asked)
        verifier = TicketVerifier(certificates.identity(Role.RUNNER, "anybody"))
        ticket, grantor = verifier.open(placed.ticket, time.time())
        assert grantor == certificates.id(Role.COORDINATOR, "coordinator-1")
        assert ticket.caller == str(certificates.id(Role.CLIENT, "kim"))
        assert (ticket.runner_id, ticket.ticket_id) == (placed.runner_id, placed.ticket_id)
        assert ticket.reserved_tokens == 14
        assert 0 < ticket.expires_at - time.time() <= 10.0


async def test_the_spec_may_be_encoded_anew_on_the_way(certificates: MeshCertificates) -> None:
    """As another language does it: maps in another order, and fields that it does not know kept."""
    labels = {f"label-{number}": "x" for number in range(20)}
    engine = FakeEngine()
    asked = spec(requirements=generation_pb2.Requirements(labels=labels))
    again = spec(requirements=generation_pb2.Requirements(labels=dict(reversed(labels.items()))))
    unknown = b"\xf2\x3f\x03new"  # field 1022
    asked.MergeFromString(unknown)
    again.MergeFromString(unknown)
    async with (
        InProcessMesh(runners=[engine], certificates=certificates, runner={"labels": labels}) as mesh,
        Direct(mesh) as kim,
    ):
        events = await read(kim.generate(await kim.place(asked), again))
        assert events[-1].HasField("finished")


async def test_admins_need_no_ticket(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh, Direct(mesh, "root", Role.ADMIN) as admin:
        placed = await admin.place(spec())
        events = await read(admin.runner(placed).Generate(runner_pb2.GenerateRequest(spec=spec())))
        assert events[-1].HasField("finished")


# --- tickets that are not -------------------------------------------------------------------------------------------


async def test_a_client_without_a_ticket_is_sent_to_a_coordinator(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh, Direct(mesh) as kim:
        placed = await kim.place(spec())
        error = await refusal(kim.runner(placed).Generate(runner_pb2.GenerateRequest(spec=spec())))
        assert isinstance(error, errors.TicketRequiredError)
        assert "Coordinator.Place" in error.message


async def test_each_thing_that_is_wrong_is_refused_with_its_reason(certificates: MeshCertificates) -> None:
    async with (
        InProcessMesh(runners=2, certificates=certificates) as mesh,
        Direct(mesh) as kim,
        Direct(mesh, "eve") as eve,
    ):
        placed = await kim.place(spec())
        # Another caller, another request, another runner.
        assert isinstance(await refusal(eve.generate(placed, spec())), errors.TicketCallerError)
        assert isinstance(await refusal(kim.generate(placed, spec("echo:other"))), errors.TicketRequestError)
        other = next(service for service in mesh.runners if service.presence.runner_id != placed.runner_id)
        elsewhere = coordinator_pb2.PlaceResponse()
        elsewhere.CopyFrom(placed)
        elsewhere.address = other.address
        elsewhere.server_name = certificates.id(Role.RUNNER, other.presence.runner_id).dns_name
        assert isinstance(await refusal(kim.generate(elsewhere, spec())), errors.TicketRunnerError)
        # Damaged, in each of its parts.
        for damaged in (b"nonsense", b"", placed.ticket[:-1], bytes(reversed(placed.ticket))):
            elsewhere.CopyFrom(placed)
            elsewhere.ticket = damaged
            assert type(await refusal(kim.generate(elsewhere, spec()))) in (TicketError, errors.TicketRequiredError)
        signed = ticket_pb2.SignedTicket.FromString(placed.ticket)
        inside = ticket_pb2.Ticket.FromString(signed.ticket)
        inside.caller = str(certificates.id(Role.CLIENT, "eve"))
        signed.ticket = inside.SerializeToString()
        elsewhere.ticket = signed.SerializeToString()
        error = await refusal(eve.generate(elsewhere, spec()))
        assert type(error) is TicketError
        assert "signature" in error.message
        # None of that has used it up. Once is enough.
        assert (await read(kim.generate(placed, spec())))[-1].HasField("finished")
        assert isinstance(await refusal(kim.generate(placed, spec())), errors.TicketUsedError)
        # Too late, by the runner's clock.
        placed = await kim.place(spec())
        for service in mesh.runners:
            service._desk._wall = lambda: time.time() + 60.0
        error = await refusal(kim.generate(placed, spec()))
        assert isinstance(error, errors.TicketExpiredError)
        assert "clock" in error.message


async def test_a_ticket_of_an_earlier_life_of_the_runner_is_refused(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh, Direct(mesh) as kim:
        placed = await kim.place(spec())
        mesh.runners[0].presence.reincarnate()
        error = await refusal(kim.generate(placed, spec()))
        assert isinstance(error, errors.TicketRunnerError)
        assert "anew" in error.message


@pytest.mark.parametrize("forger", ["client", "runner", "stranger", "own authority"])
async def test_only_a_coordinator_of_this_mesh_can_grant(certificates: MeshCertificates, forger: str) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh, Direct(mesh) as kim:
        placed = await kim.place(spec())
        genuine, _ = TicketVerifier(certificates.identity(Role.RUNNER, "x")).open(placed.ticket, time.time())
        kind: type[TicketError] = errors.TicketGrantorError
        match forger:
            case "client" | "runner":
                identity = certificates.identity(Role(forger), "kim")
            case "stranger":
                identity = MeshCertificates(certificates.authority.trust_domain).identity(Role.COORDINATOR, "c")
                kind = TicketError
            case _:
                identity = signed_by_a_leaf(certificates, Role.COORDINATOR, "c").identity
                kind = TicketError
        placed.ticket = TicketSigner(identity).sign(replace(genuine, ticket_id="forged"))
        assert type(await refusal(kim.generate(placed, spec()))) is kind


# --- the books ------------------------------------------------------------------------------------------------------


async def test_who_never_comes_frees_the_place_when_the_ticket_lapses(
    certificates: MeshCertificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chorus.coordinator.granting.LEEWAY_S", 0.0)
    monkeypatch.setattr("chorus.coordinator.granting._LAG_S", 0.0)
    settings = {"ticket_ttl_s": 0.05, "max_requests": 1}
    async with InProcessMesh(runners=1, certificates=certificates, coordinator=settings) as mesh, Direct(mesh) as kim:
        books = Books(mesh)
        await kim.place(spec())
        assert books.kept == (1, 1, 1)
        assert isinstance(await refusal(kim.coordinator().Place(request())), errors.OverloadedError)
        again = await kim.place(spec(), wait=True)  # its turn comes when the first one has lapsed
        assert again.ticket
        assert books.closed("unused") == 1
        await books.until(lambda: books.kept == (0, 0, 0))
        assert (books.attempts("OK"), books.closed("unused")) == (0, 2)


async def test_who_goes_away_after_place_frees_the_place_soon_and_who_is_only_late_is_served(
    certificates: MeshCertificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chorus.coordinator.granting.HOLD_S", 0.01)
    pace = ManualPace()
    async with (
        InProcessMesh(
            runners=[FakeEngine(pace=pace)], certificates=certificates, coordinator={"max_requests": 1}
        ) as mesh,
        Direct(mesh) as kim,
    ):
        books = Books(mesh)
        late = await kim.place(spec())
        other = await kim.place(spec(), wait=True)  # long before the first ticket lapses
        reading = asyncio.create_task(read(kim.generate(late, spec())))
        await pace.waiting(1)
        await books.until(lambda: books.kept == (2, 1, 2))
        reading_other = asyncio.create_task(read(kim.generate(other, spec())))
        await pace.waiting(2)
        pace.release_all()
        assert (await reading)[-1].HasField("finished")
        assert (await reading_other)[-1].HasField("finished")
        await books.until(lambda: books.kept == (0, 0, 0))
        assert (books.closed("ended"), books.closed("unused"), books.attempts("OK")) == (2, 0, 2)


def request(**fields: Any) -> coordinator_pb2.PlaceRequest:
    return coordinator_pb2.PlaceRequest(spec=spec(), **fields)


async def test_a_client_that_vanishes_in_mid_stream_is_told_of(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[FakeEngine(pace=pace)], certificates=certificates) as mesh:
        books = Books(mesh)
        async with Direct(mesh) as kim:
            call = aiter(kim.generate(await kim.place(spec()), spec()))
            pace.release(2)
            while not (await anext(call)).event.HasField("delta"):
                pass
        await books.until(lambda: books.kept == (0, 0, 0))
        assert (books.attempts("CANCELLED"), books.closed("ended")) == (1, 1)
        assert books.tokens("output") >= 1


async def test_a_runner_that_fails_is_blamed(certificates: MeshCertificates) -> None:
    engine = FakeEngine()
    async with InProcessMesh(runners=[engine], certificates=certificates) as mesh, Direct(mesh) as kim:
        books = Books(mesh)
        engine.fail_next()
        error = await refusal(kim.generate(await kim.place(spec()), spec()))
        assert isinstance(error, errors.EngineError)
        await books.until(lambda: books.kept == (0, 0, 0))
        assert books.attempts("ENGINE_FAILED") == 1
        assert mesh.coordinators[0]._placing._failures.penalties(mesh.coordinators[0].live.now)


async def test_a_runner_that_dies_closes_its_tickets(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[FakeEngine(pace=pace)], certificates=certificates) as mesh, Direct(mesh) as kim:
        books = Books(mesh)
        reading = asyncio.create_task(refusal(kim.generate(await kim.place(spec()), spec())))
        await pace.waiting(1)
        await kim.place(spec())
        await mesh.kill_runner()
        assert isinstance(await reading, errors.UnavailableError)
        await books.until(lambda: books.kept == (0, 0, 0))
        assert books.closed("lost") + books.closed("ended") == 1
        assert books.closed("unused") == 1


async def test_a_runner_that_leaves_tells_of_the_end_itself(certificates: MeshCertificates) -> None:
    """It gives its lease back before its engine ends what still runs; that is no failure of its own."""
    pace = ManualPace()
    async with InProcessMesh(runners=[FakeEngine(pace=pace)], certificates=certificates) as mesh, Direct(mesh) as kim:
        books = Books(mesh)
        reading = asyncio.create_task(refusal(kim.generate(await kim.place(spec()), spec())))
        await pace.waiting(1)
        await mesh.runners[0].stop(0.0)
        assert isinstance(await reading, errors.DrainingError)
        await books.until(lambda: books.kept == (0, 0, 0))
        assert (books.closed("ended"), books.attempts("DRAINING")) == (1, 1)


async def test_one_that_is_relayed_instead_gives_its_place_back(certificates: MeshCertificates) -> None:
    async with (
        InProcessMesh(runners=1, certificates=certificates, coordinator={"max_requests": 1}) as mesh,
        Direct(mesh) as kim,
        Direct(mesh, "eve") as eve,
    ):
        books = Books(mesh)
        placed = await kim.place(spec())
        again = coordinator_pb2.GenerateRequest(spec=spec(), unused_ticket_id=placed.ticket_id)
        assert isinstance(
            await refusal(eve.coordinator().Generate(again, timeout=0.2)), errors.DeadlineExceededError
        ), "it was another caller's to give back"
        events = await read(kim.coordinator().Generate(again, timeout=10))
        assert events[-1].HasField("finished")
        assert books.closed("returned") == 1
        await books.until(lambda: books.kept == (0, 0, 0))


async def test_what_ended_while_nobody_listened_is_told_afterwards(certificates: MeshCertificates) -> None:
    """The coordinator's connection to the runner breaks and comes back; the client's own stream goes on."""
    async with InProcessMesh(runners=1, certificates=certificates) as mesh, Direct(mesh) as kim:
        books = Books(mesh)
        placed = await kim.place(spec())
        granting = mesh.coordinators[0]._granting
        (watch,) = granting._watches.values()
        watch.task.cancel()
        await asyncio.wait({watch.task})
        watch.up = False
        assert (await read(kim.generate(placed, spec())))[-1].HasField("finished")
        assert books.kept == (1, 1, 1)
        granting._watches.clear()
        await kim.place(spec())  # listens again
        await books.until(lambda: books.closed("ended") == 1)
        assert books.kept == (1, 1, 1)


# --- where there is no direct mode ----------------------------------------------------------------------------------


async def test_a_runner_that_can_not_tell_gets_no_clients(certificates: MeshCertificates) -> None:
    async def script(_request: Any, _context: Any) -> None:
        raise AssertionError("nobody is sent here")

    runner = ScriptedRunner(script)
    async with (
        InProcessMesh(runners=0, certificates=certificates, registry={"lease_ttl_s": 60.0}) as mesh,
        Direct(mesh) as kim,
    ):
        await runner.join(mesh)
        error = await refusal(kim.coordinator().Place(request(), timeout=10))
        assert isinstance(error, errors.UnavailableError)
        assert "tickets" in error.message
        assert Books(mesh).kept == (0, 0, 0)
        await runner.leave()


async def test_place_refuses_as_generate_does(certificates: MeshCertificates) -> None:
    async with (
        InProcessMesh(runners=[FakeEngine([FakeModel(context_length=64)])], certificates=certificates) as mesh,
        Direct(mesh) as kim,
    ):
        place = kim.coordinator().Place
        unknown = coordinator_pb2.PlaceRequest(spec=spec(model="nothing"))
        assert isinstance(await refusal(place(unknown)), errors.UnknownModelError)
        assert isinstance(await refusal(place(coordinator_pb2.PlaceRequest())), errors.InvalidRequestError)
        assert Books(mesh).kept == (0, 0, 0)
