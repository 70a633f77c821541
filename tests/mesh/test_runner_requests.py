"""A runner tells whose requests it has, so that a coordinator knows its own from others'."""

from __future__ import annotations

import asyncio

from chorus.core.fleet.directory import Directory
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace


async def test_requests_are_told_by_the_coordinator_that_relays_them_or_granted_their_ticket(
    certificates: MeshCertificates,
) -> None:
    async with (
        asyncio.timeout(60),
        InProcessMesh(runners=[FakeEngine(pace=ManualPace())], coordinators=2, certificates=certificates) as mesh,
    ):
        one, other = (str(certificates.id(Role.COORDINATOR, f"coordinator-{number}")) for number in (1, 2))

        def told(directory: Directory) -> dict[str, int]:
            return dict(directory.entries["runner-1"].record.load.by_coordinator or {})

        relayed = [mesh.client(coordinators=[index]) for index in (0, 1, 1)]
        asking = [asyncio.create_task(client.complete("hello")) for client in relayed]
        asking.append(asyncio.create_task(mesh.client(coordinators=[0], direct="always").complete("hello")))
        # Each of them hears of its own and of the other's; its own are not counted twice.
        for index in (0, 1):
            await mesh.until(lambda directory: told(directory) == {one: 2, other: 2}, coordinator=index)
            assert mesh.coordinators[index]._placing.situation().in_flight == {}
            assert mesh.coordinators[index]._placing.situation().company == 5 / 3
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        for index in (0, 1):
            await mesh.until(lambda directory: told(directory) == {}, coordinator=index)
            assert mesh.coordinators[index]._placing.situation().in_flight == {}
