"""The life of a service's process: when it is ready, how it ends, and what it says where it can't begin."""

from __future__ import annotations

import signal

import pytest

from tests.mesh.child import child

# A service that behaves as its argument says.
SERVICE = """
import asyncio, sys
from prometheus_client import CollectorRegistry
from chorus.config import LogSettings
from chorus.core.errors import ConfigError, EngineError, StaleIncarnationError
from chorus.telemetry.logs import get_logger
from chorus.transport.process import HostedService, run_service

how = sys.argv[1]

class Service(HostedService):
    address = "127.0.0.1:1"

    async def start(self):
        get_logger().info("starting")
        if how == "misconfigured":
            raise ConfigError("runner.slots: should be\\n    more")
        if how == "broken":
            raise EngineError("the engine is broken")
        if how == "defective":
            raise KeyError("a defect")
        if how == "slow":
            await asyncio.get_running_loop().create_future()

    async def stop(self, grace_s):
        get_logger().info("asked to stop", grace_s=grace_s)
        if how == "stuck":
            await asyncio.get_running_loop().create_future()

    async def wait_failed(self):
        if how == "stale":
            return StaleIncarnationError("a newer one lives")
        return await super().wait_failed()

async def build(metrics):
    return Service()

sys.exit(run_service("thing", build, log=LogSettings(format="json"), metrics=CollectorRegistry(), grace_s=7.0))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_asked_once_it_stops_with_its_grace(number: signal.Signals) -> None:
    async with child(SERVICE, "well") as process:
        ready = await process.event("service.ready")
        assert (ready["address"], ready["service"]) == ("127.0.0.1:1", "thing")
        process.signal(number)
        assert (await process.event("asked to stop"))["grace_s"] == 7.0
        await process.event("service.stopped")
        assert await process.ended() == 0
        assert process.plain == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_asked_twice_it_goes_at_once(number: signal.Signals, code: int) -> None:
    async with child(SERVICE, "stuck") as process:
        await process.event("service.ready")
        process.signal(signal.SIGTERM)
        await process.event("asked to stop")
        process.signal(number)
        assert await process.ended() == code


async def test_asked_while_it_starts_it_stops() -> None:
    async with child(SERVICE, "slow") as process:
        await process.event("starting")
        process.signal(signal.SIGTERM)
        await process.event("asked to stop")
        assert await process.ended() == 0


@pytest.mark.parametrize(
    ("how", "code", "line"),
    [
        ("misconfigured", 2, "chorus thing: runner.slots: should be more"),
        ("broken", 1, "chorus thing: the engine is broken"),
        ("stale", 1, "chorus thing: a newer one lives"),
        ("defective", 1, "chorus thing: internal error: KeyError: 'a defect'"),
    ],
)
async def test_what_goes_wrong_is_one_line_and_an_exit_code(how: str, code: int, line: str) -> None:
    async with child(SERVICE, how) as process:
        await process.event("asked to stop")
        assert await process.ended() == code
        assert process.plain == [line]
