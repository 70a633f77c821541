"""No message takes a process down or shows its insides: every RPC, with made-up messages and with raw bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
from google.protobuf import message_factory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.core.generation import GenerationRequest, Requirements
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.wire.errors import from_rpc_error
from chorus.wire.generation import encode_generation
from tests.mesh.message_strategies import messages
from tests.mesh.whole_mesh import SERVICES, WholeMesh, path, running
from tests.wire import strategies as some

# Whatever it is sent, it does what it is for: another authority takes over, which the callers here don't believe.
LEFT_OUT = {"RotateAuthority"}
METHODS = [
    (kind, method) for kind, service in SERVICES.items() for method in service.methods if method.name not in LEFT_OUT
]
IDS = [f"{kind}-{method.name}" for kind, method in METHODS]
CALLER = {
    "registry": Role.ADMIN,
    "runner": Role.ADMIN,
    "coordinator": Role.CLIENT,
    "identity": Role.ADMIN,
    "enrolment": Role.CLIENT,  # asks nobody for a certificate
}
ONLY_RUNNERS = {"Register", "Heartbeat", "KeepLease"}
INSIDES = ("Traceback", "Exception", ".py", "object at 0x", "google.protobuf", "NoneType", "DecodeError")

REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,  # about somebody else's runner
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
}
fuzzing = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def mesh(certificates: MeshCertificates) -> Iterator[WholeMesh]:
    with running(certificates) as whole:
        yield whole
        # Whatever was sent: each service still answers.
        request = coordinator_pb2.GenerateRequest()
        request.spec.prompt = "still there?"
        raw = request.SerializeToString()
        answer, error = whole.call("coordinator", Role.CLIENT, f"/{coordinator()}/Generate", raw, streams=True)
        assert error is None
        assert coordinator_pb2.GenerateResponse.FromString(answer).HasField("event")
        for kind, name in (("registry", "ListNodes"), ("runner", "GetNode")):
            method = SERVICES[kind].methods_by_name[name]
            _, error = whole.call(kind, Role.ADMIN, path(method), b"", streams=False)
            assert error is None


def coordinator() -> str:
    return SERVICES["coordinator"].full_name


def send(mesh: WholeMesh, number: int, raw: bytes) -> None:
    """Sends bytes to a method: it answers with a message, or refuses in words for people and programs."""
    kind, method = METHODS[number]
    role = Role.RUNNER if method.name in ONLY_RUNNERS else CALLER[kind]
    answer, error = mesh.call(kind, role, path(method), raw, streams=method.server_streaming)
    if error is None:
        message_factory.GetMessageClass(method.output_type).FromString(answer)
        return
    assert isinstance(error, grpc.Call)
    said = f"{error.code()}: {error.details()}"
    assert error.code() in REFUSALS, said
    refusal = from_rpc_error(error)
    assert refusal.message, said
    assert refusal.metadata.get("request_id"), said
    assert not any(inside in refusal.message for inside in INSIDES), said


@pytest.mark.parametrize("number", range(len(METHODS)), ids=IDS)
@fuzzing
@given(data=st.data())
def test_made_up_messages(mesh: WholeMesh, number: int, data: st.DataObject) -> None:
    message = data.draw(messages(METHODS[number][1].input_type))
    send(mesh, number, message.SerializeToString())


@pytest.mark.parametrize("number", range(len(METHODS)), ids=IDS)
@fuzzing
@given(data=st.data())
def test_raw_bytes(mesh: WholeMesh, number: int, data: st.DataObject) -> None:
    whole = data.draw(messages(METHODS[number][1].input_type)).SerializeToString()
    cut = data.draw(st.integers(0, len(whole)))
    send(mesh, number, data.draw(st.sampled_from([whole[:cut], whole[cut:]])) + data.draw(st.binary(max_size=16)))


@pytest.mark.parametrize("kind", ["runner", "coordinator"])
@pytest.mark.parametrize("name", ["Generate", "CountTokens"])
@fuzzing
@given(request=some.requests())
def test_requests_that_get_as_far_as_the_engine(
    mesh: WholeMesh, kind: str, name: str, request: GenerationRequest
) -> None:
    number = METHODS.index((kind, SERVICES[kind].methods_by_name[name]))
    spec = encode_generation(replace(request, model="", requirements=Requirements()))
    message = message_factory.GetMessageClass(METHODS[number][1].input_type)()
    message.spec.CopyFrom(spec)  # type: ignore[attr-defined]
    send(mesh, number, message.SerializeToString())
