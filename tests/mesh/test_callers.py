"""Callers with API keys against a whole mesh of two coordinators over real TLS, which share one store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.serialization import Encoding
from grpc_reflection.v1alpha import reflection_pb2

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.client import Completion, MeshClient
from chorus.client.keys import KnownKey
from chorus.core.callers import Limits, Scopes, Usage
from chorus.core.ensemble.records import EnsembleSpec, MemberSpec, Strategy
from chorus.core.errors import (
    ApiKeyError,
    ApiKeyRevokedError,
    CertificateError,
    ChorusError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
    UnavailableError,
    UnknownModelError,
)
from chorus.core.generation import GenerationRequest, Requirements, StopConditions, TextPrompt
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace
from tests.mesh.test_direct import Direct, read, refusal, spec
from tests.store.valkey_server import running

pytestmark = pytest.mark.asyncio(loop_scope="module")
CERTIFICATES = MeshCertificates()
CA_PEM = CERTIFICATES.authority.certificate_pem


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[InProcessMesh]:
    folder = tmp_path_factory.mktemp("callers")
    async with InProcessMesh(coordinators=2, certificates=CERTIFICATES, callers={"dir": folder}) as whole:
        yield whole


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ca") / "ca.crt"
    path.write_bytes(CA_PEM)
    return str(path)


def admin(mesh: InProcessMesh, index: int = 0) -> MeshClient:
    return mesh.client(role=Role.ADMIN, name="root", coordinators=[index])


async def holder(
    mesh: InProcessMesh, ca: str, folder: Path, *, coordinators: list[int] | None = None, **options: object
) -> tuple[MeshClient, KnownKey]:
    """A client with a new key, and the key."""
    key, text = await admin(mesh).keys.create("ann", **options)  # type: ignore[arg-type]
    file = folder / f"{key.key_id}.key"
    file.write_text(text + "\n")
    file.chmod(0o600)
    return mesh.key_client(file, ca=ca, coordinators=coordinators), key


async def settled(mesh: InProcessMesh, key: KnownKey) -> Usage:
    """What was used, once nothing is under way: a runner's word of a ticket, or of a cancelled call, is on its way."""
    while True:
        used = await admin(mesh).keys.usage(key.key_id)
        if not used.concurrent:
            return used


async def outcomes(*asking: object) -> tuple[int, list[BaseException]]:
    told = await asyncio.gather(*asking, return_exceptions=True)  # type: ignore[arg-type]
    errors = [one for one in told if isinstance(one, BaseException)]
    return len(told) - len(errors), errors


async def test_a_key_asks_and_is_counted_at_both_coordinators(mesh: InProcessMesh, ca: str, tmp_path: Path) -> None:
    client, key = await holder(mesh, ca, tmp_path)
    answer = await client.complete("hello", max_tokens=5)
    assert answer.text
    assert (await client.list_models()).models
    assert (await client.embed(["one", "two"])).embeddings
    used = await admin(mesh, 1).keys.usage(key.key_id)
    assert used.requests == 2
    assert used.output_tokens == answer.usage.completion_tokens
    assert used.prompt_tokens >= answer.usage.prompt_tokens > 0
    assert used.concurrent == 0


async def test_requests_are_counted_exactly_over_two_coordinators(mesh: InProcessMesh, ca: str, tmp_path: Path) -> None:
    _, key = await holder(mesh, ca, tmp_path, limits=Limits(requests_per_minute=40))
    file = tmp_path / f"{key.key_id}.key"
    clients = [mesh.key_client(file, ca=ca, coordinators=[index]) for index in (0, 1)]
    let, errors = await outcomes(*(clients[n % 2].complete(f"q{n}", max_tokens=2) for n in range(100)))
    assert let == 40
    assert all(isinstance(error, QuotaExceededError) for error in errors)
    error = errors[0]
    assert isinstance(error, QuotaExceededError)
    assert error.metadata["quota"] == "requests_per_minute"
    assert 0 < (error.retry_after_s or 0) <= 60.25
    used = await admin(mesh).keys.usage(key.key_id)
    assert (used.requests, used.requests_this_minute, used.concurrent) == (40, 40, 0)


async def test_tokens_are_counted_as_they_were_used(mesh: InProcessMesh, ca: str, tmp_path: Path) -> None:
    client, key = await holder(mesh, ca, tmp_path, limits=Limits(tokens_per_minute=400, total_tokens=100_000))
    spent = 0

    async def ask_until_refused() -> None:
        nonlocal spent
        for n in range(200):
            usage = (await client.complete(f"question {n}", max_tokens=4)).usage
            spent += usage.prompt_tokens + usage.completion_tokens

    with pytest.raises(QuotaExceededError) as told:
        await ask_until_refused()
    assert told.value.metadata["quota"] == "tokens_per_minute"
    used = await admin(mesh).keys.usage(key.key_id)
    assert used.tokens_this_minute == used.total_tokens == spent
    assert 400 - 40 < spent <= 400 + 40  # but for one request's estimate
    with pytest.raises(QuotaExceededError) as never:
        await client.complete("x", max_tokens=5000)
    assert never.value.retry_after_s is None


async def test_direct_mode_is_under_the_limits_of_its_certificate(mesh: InProcessMesh, ca: str, tmp_path: Path) -> None:
    relayed, key = await holder(mesh, ca, tmp_path, limits=Limits(requests_per_minute=30), client="bob")
    await admin(mesh, 1).keys.list()  # the other coordinator has heard of it then
    direct = [mesh.client(name="bob", coordinators=[index], direct="always") for index in (0, 1)]
    asked = [*direct, relayed] * 15
    let, errors = await outcomes(*(client.complete(f"q{n}", max_tokens=3) for n, client in enumerate(asked)))
    assert let == 30, errors
    assert {type(error) for error in errors} == {QuotaExceededError}
    used = await settled(mesh, key)
    assert used.requests == 30
    assert used.output_tokens == 30 * 3
    assert (await mesh.client(name="carol").complete("free", max_tokens=2)).text


async def test_a_ticket_that_is_given_back_and_used_all_the_same_is_counted(
    mesh: InProcessMesh, ca: str, tmp_path: Path
) -> None:
    _, key = await holder(mesh, ca, tmp_path, limits=Limits(tokens_per_minute=10_000), client="eve")
    async with Direct(mesh, "eve") as eve:
        placed = await eve.place(spec())
        back = pb.GenerateRequest(unused_ticket_id=placed.ticket_id, spec=spec(model="none-such"))
        assert isinstance(await refusal(eve.coordinator().Generate(back, timeout=10)), UnknownModelError)
        events = await read(eve.generate(placed, spec()))
    usage = events[-1].finished.usage
    used = await settled(mesh, key)
    while used.output_tokens == 0:  # the runner's word of it comes by itself
        used = await settled(mesh, key)
    assert (used.requests, used.prompt_tokens, used.output_tokens) == (
        2,  # the one that gave it back, too
        usage.prompt_token_count,
        usage.completion_token_count,
    )


@asynccontextmanager
async def paced_mesh(folder: Path) -> AsyncIterator[tuple[InProcessMesh, ManualPace]]:
    """Two coordinators with keys, and a runner whose tokens come as they are released."""
    pace = ManualPace()
    settings = {"dir": folder / "callers"}
    async with InProcessMesh(
        runners=[FakeEngine(pace=pace)], coordinators=2, certificates=CERTIFICATES, callers=settings
    ) as mesh:
        yield mesh, pace


async def test_places_are_free_again(ca: str, tmp_path: Path) -> None:
    async with paced_mesh(tmp_path) as (mesh, pace):
        client, key = await holder(mesh, ca, tmp_path, limits=Limits(concurrent=2))
        asking = [asyncio.create_task(client.complete(f"q{n}", max_tokens=30)) for n in range(6)]
        while sum(task.done() for task in asking) < 4:  # those that are let in have no token before all have come
            await asyncio.wait([task for task in asking if not task.done()], return_when=asyncio.FIRST_COMPLETED)
        pace.release(60)
        let, errors = await outcomes(*asking)
        assert (let, {type(error) for error in errors}) == (2, {QuotaExceededError})
        pace.release(1)
        generation = client.generate("one more", max_tokens=400)
        await anext(aiter(generation))
        await generation.aclose()  # who goes away in the middle frees its place, too
        await settled(mesh, key)
        pace.release_all()
        for n in range(3):  # one after the other: each is settled by the time that its caller has the end
            await client.complete(f"again {n}", max_tokens=2)


async def test_scopes(mesh: InProcessMesh, ca: str, tmp_path: Path) -> None:
    model = (await admin(mesh).list_models()).models[0].artifact.family
    scopes = Scopes((model,), frozenset({Strategy.VOTE}))
    client, _ = await holder(mesh, ca, tmp_path, scopes=scopes)
    assert (await client.complete("hello", model=model, max_tokens=2)).text
    for what in (
        client.complete("hello", model="another", max_tokens=2),
        client.embed(["x"], model="another"),
        client.ensemble("hello", EnsembleSpec(Strategy.RACE, (MemberSpec(model),))).completion(),
        client.ensemble("hello", EnsembleSpec(Strategy.VOTE, (MemberSpec("another"),))).completion(),
    ):
        with pytest.raises(PermissionDeniedError) as told:
            await what
        assert told.value.metadata["scope"] in ("models", "strategies")
    assert (await client.ensemble("hi", EnsembleSpec(Strategy.VOTE), max_tokens=2).completion()).text


async def test_no_way_leads_to_a_model_that_a_key_is_not_for(mesh: InProcessMesh, ca: str, tmp_path: Path) -> None:
    artifact = (await admin(mesh).list_models()).models[0].artifact
    client, _ = await holder(mesh, ca, tmp_path, scopes=Scopes(("allowed-*",)))
    unnamed = GenerationRequest("", TextPrompt("hello"), stop=StopConditions(max_tokens=2))
    of_tier = replace(unnamed, requirements=Requirements(tier=artifact.tier))
    specs = [EnsembleSpec(strategy) for strategy in (Strategy.ROUTE, Strategy.AUTO, Strategy.VOTE, Strategy.CASCADE)]
    specs += [EnsembleSpec(Strategy.VOTE, (MemberSpec(""), MemberSpec("", instructions="Be brief.")))]
    for asked in (unnamed, of_tier):
        for what in (client.complete(asked), *(client.ensemble(asked, one).completion() for one in specs)):
            with pytest.raises(PermissionDeniedError) as told:
                await what
            assert told.value.metadata["scope"] == "models"


async def test_a_tier_does_not_choose_a_model_for_a_key_of_some(mesh: InProcessMesh, ca: str, tmp_path: Path) -> None:
    artifact = (await admin(mesh).list_models()).models[0].artifact
    client, _ = await holder(mesh, ca, tmp_path, scopes=Scopes((artifact.family,)))
    asked = GenerationRequest("", TextPrompt("hello"), stop=StopConditions(max_tokens=2))
    assert (await client.complete(asked)).text, "the default model is its own"
    with pytest.raises(PermissionDeniedError, match="must name the model"):
        await client.complete(replace(asked, requirements=Requirements(tier=artifact.tier)))


async def test_what_callers_may_not_do_at_all(mesh: InProcessMesh, ca: str, tmp_path: Path) -> None:
    client, key = await holder(mesh, ca, tmp_path)
    for what in (client.keys.list(), client.keys.revoke(key.key_id), client.list_nodes(), client.keys.create("x")):
        with pytest.raises(PermissionDeniedError):
            await what
    with pytest.raises(PermissionDeniedError):  # a client with a certificate is no admin either
        await mesh.client(name="ann").keys.list()


async def test_a_revoked_key_is_cut_off_everywhere_with_its_open_streams(ca: str, tmp_path: Path) -> None:
    async with paced_mesh(tmp_path) as (mesh, pace):
        client, key = await holder(mesh, ca, tmp_path, coordinators=[1])
        events = aiter(client.generate("a long one", max_tokens=100))
        pace.release(1)
        await anext(events)
        await admin(mesh, 0).keys.revoke(key.key_id)

        async def read_on() -> None:
            async with asyncio.timeout(5):  # there are no more tokens
                async for _ in events:
                    pass

        with pytest.raises(ApiKeyRevokedError):
            await read_on()
        with pytest.raises(ApiKeyRevokedError):
            await client.complete("again", max_tokens=2)
        await admin(mesh, 1).keys.revoke(key.key_id)  # safe to ask twice
        with pytest.raises(NotFoundError):
            await admin(mesh).keys.revoke("0" * 16)
        assert [known.state for known in await admin(mesh).keys.list()] == ["revoked"]


@pytest.mark.parametrize("shown", ["chorus_0123456789abcdef_" + "A" * 43, "secret", "eyJhbGciOiJub25lIn0.e30."])
async def test_no_key_of_this_mesh(mesh: InProcessMesh, ca: str, tmp_path: Path, shown: str) -> None:
    file = tmp_path / "wrong.key"
    file.write_text(shown)
    file.chmod(0o600)
    with pytest.raises(ApiKeyError) as told:
        await mesh.key_client(file, ca=ca).complete("hello")
    assert shown not in str(told.value)


async def test_without_any_key(mesh: InProcessMesh) -> None:
    address = mesh.coordinators[0].side_addresses["callers"]
    options = (("grpc.ssl_target_name_override", CERTIFICATES.id(Role.COORDINATOR, "coordinator-1").dns_name),)
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(CA_PEM), options=options) as channel:
        call = channel.unary_unary("/chorus.api.coordinator.v1.Coordinator/ListModels")
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await call(b"")
        assert told.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "authorization: Bearer" in (told.value.details() or "")
        two = (("authorization", "Bearer a"), ("authorization", "Bearer b"))
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await call(b"", metadata=two)
        assert told.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("version", ["v1alpha", "v1"])
async def test_services_describe_themselves_to_holders_of_keys_alone(
    mesh: InProcessMesh, ca: str, tmp_path: Path, version: str
) -> None:
    """So that grpcurl needs no .proto files here either."""
    _, key = await holder(mesh, ca, tmp_path)
    shown = (("authorization", f"Bearer {(tmp_path / f'{key.key_id}.key').read_text().strip()}"),)
    address = mesh.coordinators[0].side_addresses["callers"]
    options = (("grpc.ssl_target_name_override", CERTIFICATES.id(Role.COORDINATOR, "coordinator-1").dns_name),)
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(CA_PEM), options=options) as channel:
        describe = channel.unary_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = [one async for one in describe(asked, metadata=shown)]
        names = {service.name for service in answer.list_services_response.service}
        assert "chorus.api.coordinator.v1.Coordinator" in names
        with pytest.raises(grpc.aio.AioRpcError) as told:
            [one async for one in describe(asked)]
        assert told.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_mesh_is_known_by_its_fingerprint(mesh: InProcessMesh, ca: str, tmp_path: Path) -> None:
    _, key = await holder(mesh, ca, tmp_path)
    file = tmp_path / f"{key.key_id}.key"
    digest = hashlib.sha256(CERTIFICATES.authority.certificate.public_bytes(Encoding.DER)).hexdigest()
    client = await asyncio.to_thread(mesh.key_client, file, ca=digest)
    assert (await client.complete("hello", max_tokens=2)).text
    with pytest.raises(CertificateError, match="another fingerprint"):
        await asyncio.to_thread(mesh.key_client, file, ca="0" * 64)
    other = tmp_path / "other.crt"
    other.write_bytes(MeshCertificates().authority.certificate_pem)
    with pytest.raises(UnavailableError):  # its key was shown to nobody: the handshake failed
        await mesh.key_client(file, ca=str(other), timeout_s=5).complete("hello")


async def test_what_no_key_can_be(mesh: InProcessMesh) -> None:
    keys = admin(mesh).keys
    for wrong in ({"name": ""}, {"name": "x\n"}, {"name": "x", "client": "Not A Label"}, {"name": "x", "ttl_s": -1.0}):
        with pytest.raises(InvalidRequestError):
            await keys.create(**wrong)  # type: ignore[arg-type]


async def test_quotas_at_a_redis_that_goes_away_and_comes_back(ca: str, tmp_path: Path) -> None:
    for server in running(tmp_path):
        valkey, settings = {"url_file": server.url_file, "timeout_s": 1.0}, {"dir": tmp_path / "c", "store": "valkey"}
        async with InProcessMesh(coordinators=2, certificates=CERTIFICATES, callers=settings, valkey=valkey) as mesh:
            _, key = await holder(mesh, ca, tmp_path, limits=Limits(requests_per_minute=20))
            file = tmp_path / f"{key.key_id}.key"
            clients = [mesh.key_client(file, ca=ca, coordinators=[index]) for index in (0, 1)]
            let, errors = await outcomes(*(clients[n % 2].complete(f"q{n}", max_tokens=2) for n in range(50)))
            assert (let, {type(error) for error in errors}) == (20, {QuotaExceededError})
            server.kill()
            with pytest.raises(UnavailableError, match="quotas can't be counted"):
                await outlasting_the_memo(clients[0])
            assert (await mesh.client().complete("hello", max_tokens=2)).text
            await mesh.restart_coordinator(1)  # it can't know whom keys limit
            with pytest.raises(UnavailableError, match="keys are not known yet"):
                await mesh.client(name="bob", coordinators=[1]).complete("hello", max_tokens=2)
            server.start()  # which has forgotten all: keys go on as they are known, quotas begin anew
            assert (await outlasting_the_memo(clients[0])).text


async def outlasting_the_memo(client: MeshClient) -> Completion:
    """Asks until it is answered in another way than by what was refused a moment before."""
    while True:
        try:
            return await client.complete("again", max_tokens=2)
        except QuotaExceededError:
            continue


async def test_while_the_store_is_away_limits_hold_and_the_rest_goes_on(tmp_path: Path, ca: str) -> None:
    folder = tmp_path / "callers"
    async with InProcessMesh(certificates=CERTIFICATES, callers={"dir": folder}) as mesh:
        limited, _ = await holder(mesh, ca, tmp_path, limits=Limits(requests_per_minute=100))
        free, _ = await holder(mesh, ca, tmp_path)
        await limited.complete("hello", max_tokens=2)
        callers = mesh.coordinators[0]._callers
        assert callers is not None
        await callers._store._thread.run(lambda db: db.close())  # type: ignore[attr-defined]
        with pytest.raises(UnavailableError, match="quotas can't be counted") as told:
            await limited.complete("hello", max_tokens=2)
        assert (told.value.retry_after_s or 0) > 0
        assert (await free.complete("hello", max_tokens=2)).text
        assert (await mesh.client().complete("hello", max_tokens=2)).text
        with pytest.raises(ChorusError):
            await admin(mesh).keys.create("x")
