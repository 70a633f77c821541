"""Keys and quotas in a shared SQLite file and at a real Redis: the same answers as core's, whoever asks at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.config import ValkeySettings
from chorus.core.callers import Account, ApiKey, Limits, Scopes
from chorus.core.errors import UnavailableError
from chorus.core.generation import Priority
from chorus.store.callers import CallerStore, FileCallers, ValkeyCallers
from chorus.store.valkey import Valkey
from tests.store.valkey_server import ValkeyServer, running

NOW = 1_790_000_000.0
MakeStore = Callable[[], CallerStore]
Wall = Callable[[], float]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    yield from running(tmp_path_factory.mktemp("valkey"))


def _at_valkey(server: ValkeyServer, prefix: str, wall: Wall | None) -> ValkeyCallers:
    valkey = Valkey.configured(ValkeySettings(url_file=server.url_file, prefix=prefix, timeout_s=10))
    assert valkey is not None
    return ValkeyCallers(valkey, wall=wall)


@pytest.fixture(params=["file", "valkey"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Callable[[Wall], CallerStore]]:
    """Makes stores that share one file or one server, as several coordinators have them."""
    made: list[CallerStore] = []

    def store(wall: Wall) -> CallerStore:
        if request.param == "file":
            made.append(FileCallers(tmp_path / "callers.db", wall=wall))
        else:
            server: ValkeyServer = request.getfixturevalue("server")
            made.append(_at_valkey(server, f"{tmp_path.name}:", wall))
        return made[-1]

    yield store
    for one in made:
        await one.close()


async def test_two_coordinators_share_what_there_is(make: Callable[[Wall], CallerStore]) -> None:
    stores, limits = [make(lambda: NOW), make(lambda: NOW)], Limits(requests_per_minute=100, tokens_per_minute=450)
    told = await asyncio.gather(*(stores[n % 2].take("a", f"r{n}", limits, 4) for n in range(240)))
    assert sum(refusal is None for refusal in told) == 100
    await asyncio.gather(
        *(stores[n % 2].settle("a", f"r{n}", begun=True, prompt=1, output=1) for n in range(240) if told[n] is None)
    )
    usage = await stores[1].usage("a")
    assert (usage.requests, usage.total_tokens, usage.tokens_this_minute, usage.concurrent) == (100, 200, 200, 0)
    assert (usage.prompt_tokens, usage.output_tokens) == (100, 100)
    assert await stores[0].usage("another") == (await stores[1].usage("another"))


async def test_keys_are_seen_by_all_and_told_once(make: Callable[[Wall], CallerStore]) -> None:
    one, other = make(lambda: NOW), make(lambda: NOW)
    key = ApiKey(
        "0" * 16,
        "ann",
        b"d" * 32,
        created_at=NOW,
        created_by="root",
        client="ann",
        scopes=Scopes(("qwen*",), priorities=frozenset({Priority.BATCH})),
        limits=Limits(concurrent=2),
    )
    await one.put(key)
    ring = await other.ring(-1)
    assert ring is not None
    assert ring.keys == (key,)
    assert await other.ring(ring.revision) is None
    assert await one.pepper_mark(b"mine") == await other.pepper_mark(b"other") == b"mine"


async def test_a_store_that_is_away_is_said_to_be(tmp_path: Path, server: ValkeyServer) -> None:
    gone = FileCallers(tmp_path / "none" / "callers.db")
    with pytest.raises(UnavailableError, match=r"callers\.db"):
        await gone.take("a", "r", Limits(), 1)
    await gone.close()
    dead = Valkey("redis://127.0.0.1:1/0", prefix="x:", timeout_s=1.0)
    with pytest.raises(UnavailableError, match="Valkey"):
        await ValkeyCallers(dead).take("a", "r", Limits(), 1)
    await dead.close()


_STEP = st.one_of(
    st.tuples(st.just("take"), st.integers(0, 6), st.integers(0, 45)),
    st.tuples(st.just("settle"), st.integers(0, 6), st.booleans(), st.integers(0, 30), st.integers(0, 30)),
    st.tuples(st.just("renew"), st.integers(0, 6)),
    st.tuples(st.just("wait"), st.sampled_from([1, 249, 250, 5_000, 29_999, 30_000, 60_001, 60_250, 40_000_000])),
)
_LIMITS = st.builds(
    Limits,
    requests_per_minute=st.sampled_from([0, 2, 4]),
    tokens_per_minute=st.sampled_from([0, 40, 60]),
    tokens_per_day=st.sampled_from([0, 90]),
    concurrent=st.sampled_from([0, 1, 2]),
    total_tokens=st.sampled_from([0, 150]),
)


@settings(max_examples=40, deadline=None)
@given(limits=_LIMITS, steps=st.lists(_STEP, max_size=25))
def test_the_script_decides_as_core_does(
    server: ValkeyServer, limits: Limits, steps: list[tuple[str, int]] | list[tuple[object, ...]]
) -> None:
    now_ms = [1_790_000_000_123]
    counter = test_the_script_decides_as_core_does.__dict__
    counter["n"] = counter.get("n", 0) + 1

    async def run() -> None:
        store = _at_valkey(server, f"differential-{counter['n']}:", lambda: now_ms[0] / 1000)
        core = Account()
        try:
            for step in steps:
                what, args = step[0], [*step[1:]]
                if what == "wait":
                    now_ms[0] += args[0]  # type: ignore[operator]
                elif what == "take":
                    expected = core.take(f"r{args[0]}", now_ms[0], limits, args[1])  # type: ignore[arg-type]
                    assert await store.take("a", f"r{args[0]}", limits, args[1]) == expected  # type: ignore[arg-type]
                elif what == "settle":
                    facts = {"begun": args[1], "prompt": args[2], "output": args[3]}
                    core.settle(f"r{args[0]}", now_ms[0], **facts)  # type: ignore[arg-type]
                    await store.settle("a", f"r{args[0]}", **facts)  # type: ignore[arg-type]
                else:
                    core.renew([f"r{args[0]}"], now_ms[0])
                    await store.renew("a", [f"r{args[0]}"])
            async with store._valkey.reached() as client:
                raw = await client.get(store._account("a"))
            kept = Account(json.loads(raw)) if raw is not None else Account()
            assert kept.usage(now_ms[0]) == core.usage(now_ms[0])
            assert kept.state == core.state
        finally:
            await store.close()

    asyncio.run(run())
