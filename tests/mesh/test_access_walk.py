"""Every RPC of every service with every role, on real sockets: who may call what is written down here once more, by
hand, so that an `access` option changed by mistake is seen."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.transport.access import callers_table
from chorus.wire.errors import from_rpc_error
from tests.mesh.whole_mesh import SERVICES, WholeMesh, path, running

ASKERS = {Role.CLIENT, Role.ADMIN}
OF_RUNNERS = {Role.COORDINATOR, Role.CLIENT, Role.ADMIN}

EXPECTED: dict[str, dict[str, set[Role]]] = {
    "registry": {
        "Register": {Role.RUNNER},
        "Heartbeat": {Role.RUNNER},
        "KeepLease": {Role.RUNNER},
        "Deregister": {Role.RUNNER, Role.ADMIN},
        "ListNodes": OF_RUNNERS,
        "WatchNodes": OF_RUNNERS,
    },
    "runner": {
        "Generate": OF_RUNNERS,
        "Embed": OF_RUNNERS,
        "Rerank": OF_RUNNERS,
        "Tokenize": OF_RUNNERS,
        "Detokenize": OF_RUNNERS,
        "CountTokens": OF_RUNNERS,
        "ListModels": OF_RUNNERS,
        "LoadModel": {Role.COORDINATOR, Role.ADMIN},
        "UnloadModel": {Role.COORDINATOR, Role.ADMIN},
        "WatchTickets": {Role.COORDINATOR},
        "GetNode": set(Role) - {Role.IDENTITY},
    },
    "coordinator": {
        "Generate": ASKERS,
        "Place": ASKERS,
        "Embed": ASKERS,
        "Rerank": ASKERS,
        "CountTokens": ASKERS,
        "ListModels": ASKERS,
        "ListNodes": ASKERS,
        "WatchNodes": ASKERS,
        "WatchEvents": ASKERS,
        "GetStats": ASKERS,
        "GetCache": ASKERS,
        "ClearCache": ASKERS,
        "GetCosts": ASKERS,
        "RateResponse": ASKERS,
        "GetLearning": ASKERS,
        "ChangeLearning": {Role.ADMIN},
        "ExplainPlacement": ASKERS,
        "CreateKey": {Role.ADMIN},
        "ListKeys": {Role.ADMIN},
        "RevokeKey": {Role.ADMIN},
        "GetKeyUsage": {Role.ADMIN},
    },
    "identity": {
        "CreateToken": {Role.ADMIN},
        "ListTokens": {Role.ADMIN},
        "RevokeToken": {Role.ADMIN},
        "ListMembers": {Role.ADMIN},
        "Revoke": {Role.ADMIN},
        "Restore": {Role.ADMIN},
        "GetAuthority": {Role.ADMIN},
        "RotateAuthority": {Role.ADMIN},
        "WatchRevocations": set(Role),
    },
    # Asked of a listener to which nobody shows who they are.
    "enrolment": {"Join": set(Role), "Renew": set(Role)},
}


# Of the coordinator's listener for callers with keys.
FOR_KEYS = {"Generate", "Embed", "Rerank", "CountTokens", "ListModels"}


@pytest.fixture(scope="module")
def mesh(certificates: MeshCertificates) -> Iterator[WholeMesh]:
    with running(certificates) as whole:
        yield whole


def test_every_rpc_is_on_the_list() -> None:
    assert {kind: {method.name for method in service.methods} for kind, service in SERVICES.items()} == {
        kind: set(methods) for kind, methods in EXPECTED.items()
    }


def test_what_holders_of_keys_may_call() -> None:
    for service in SERVICES.values():
        allowed = {name.rpartition("/")[2] for name, roles in callers_table(service).items() if roles}
        assert allowed == (FOR_KEYS if service.name == "Coordinator" else set())


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, methods in EXPECTED.items() for name in methods], ids="-".join
)
def test_who_may_call_it(mesh: WholeMesh, kind: str, name: str, role: Role) -> None:
    method = SERVICES[kind].methods_by_name[name]
    _, error = mesh.call(kind, role, path(method), b"", streams=method.server_streaming)
    if role in EXPECTED[kind][name]:
        # An empty request may be refused for what it lacks, or for whom it is about, but not for the caller's role.
        assert error is None or from_rpc_error(error).reason != "PERMISSION_DENIED" or "role" not in str(error)
    else:
        assert error is not None
        assert isinstance(error, grpc.Call)
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        refusal = from_rpc_error(error)
        assert refusal.reason == "PERMISSION_DENIED"
        assert role.value in refusal.message
        assert name in refusal.message


@pytest.mark.parametrize("kind", list(SERVICES))
@pytest.mark.parametrize(
    "method",
    ["/chorus.api.runner.v1.ModelRunner/NoSuch", "/grpc.channelz.v1.Channelz/GetTopChannels", "/a/b"],
)
def test_what_is_not_there_is_unimplemented_to_anybody(mesh: WholeMesh, kind: str, method: str) -> None:
    for role in Role:
        _, error = mesh.call(kind, role, method, b"", streams=False)
        assert isinstance(error, grpc.Call)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
