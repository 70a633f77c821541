"""Learning from end to end: answers are rated, what was learnt is told, frozen and forgotten."""

from __future__ import annotations

import asyncio

import pytest

from chorus.client import ensemble_spec
from chorus.core.ensemble.records import Strategy
from chorus.core.errors import InvalidRequestError, NotFoundError, PermissionDeniedError
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.mesh import InProcessMesh
from tests.mesh.test_ensemble import ASKED, engine


async def test_an_answer_is_rated_and_what_was_learnt_is_shown_and_forgotten(certificates: MeshCertificates) -> None:
    async with (
        asyncio.timeout(60),
        InProcessMesh(
            runners=[engine("one", "two")], coordinators=2, ensemble={"learning": "on"}, certificates=certificates
        ) as mesh,
    ):
        ann, bob, admin = mesh.client(name="ann"), mesh.client(name="bob"), mesh.client(role=Role.ADMIN, name="root")

        async def counted() -> float:
            return sum(one.count for own in (await ann.learning()).learnt.values() for one in own.earned)

        answer = await ann.complete(ASKED, ensemble=ensemble_spec("vote", ("one", "two")))
        assert await counted() == 1
        await ann.rate(answer.request_id, 1.0)
        await ann.rate(answer.request_id, 0.0)
        assert await counted() == 2, "the first rating counts"
        with pytest.raises(NotFoundError):
            await bob.rate(answer.request_id, 1.0)
        with pytest.raises(InvalidRequestError, match="from 0 to 1"):
            await ann.rate(answer.request_id, 2.0)
        seen = await bob.learning()
        (earned,) = [one for own in seen.learnt.values() for one in own.earned]
        assert (earned.context, earned.strategy, earned.model) == ("simple", Strategy.VOTE, "")
        assert not seen.missing
        # auto answers whatever the bandit picks.
        for _ in range(8):
            assert (await ann.complete(ASKED, ensemble=ensemble_spec("auto"))).text == "Paris"
        before = await counted()
        with pytest.raises(PermissionDeniedError):
            await ann.change_learning(frozen=True)
        await admin.change_learning(frozen=True)
        assert all(own.frozen for own in (await ann.learning()).learnt.values())
        await ann.complete(ASKED, ensemble=ensemble_spec("auto"))
        assert await counted() == before
        await admin.change_learning(frozen=False, reset=True)
        assert await counted() == 0


async def test_nothing_is_learnt_unless_that_is_configured(certificates: MeshCertificates) -> None:
    async with asyncio.timeout(60), InProcessMesh(runners=[engine("one", "two")], certificates=certificates) as mesh:
        client = mesh.client()
        answer = await client.complete(ASKED, ensemble=ensemble_spec("vote", ("one", "two")))
        with pytest.raises(NotFoundError, match=r"ensemble\.learning is off"):
            await client.rate(answer.request_id, 1.0)
        (own,) = (await client.learning()).learnt.values()
        assert (own.mode, own.earned) == ("off", ())
