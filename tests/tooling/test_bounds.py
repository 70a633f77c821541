"""An asynchronous test that hangs fails; the bound is around the test itself."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import LONGEST_S, bounded


async def test_whoever_hangs_fails(request: pytest.FixtureRequest) -> None:
    async def hangs() -> None:
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await bounded(hangs, 0.0)()
    assert request.node.obj.longest_s == LONGEST_S, "this test is bounded as well"
