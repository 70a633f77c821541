"""The connection to a shared Valkey or Redis server, against a real one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from chorus.config import ValkeySettings
from chorus.core.errors import ConfigError, UnavailableError
from chorus.store.valkey import Valkey
from tests.store.valkey_server import PASSWORD, ValkeyServer, running

_TAKE = "local n = redis.call('INCRBY', KEYS[1], ARGV[1]) return n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    yield from running(tmp_path_factory.mktemp("valkey"))


def _connected(server: ValkeyServer, prefix: str = "chorus:") -> Valkey:
    valkey = Valkey.configured(ValkeySettings(url_file=server.url_file, prefix=prefix, timeout_s=5))
    assert valkey is not None
    return valkey


async def test_a_script_is_atomic_and_meshes_do_not_see_each_other(server: ValkeyServer) -> None:
    one, other = _connected(server), _connected(server, "other:")
    try:
        take = one.script(_TAKE)
        counts = await asyncio.gather(*(take([one.key("n", "a")], [1]) for _ in range(50)))
        assert sorted(counts) == list(range(1, 51))
        async with other.reached() as client:
            assert await client.get(other.key("n", "a")) is None
            assert await client.get(one.key("n", "a")) == b"50"
    finally:
        await one.close()
        await other.close()


async def test_a_server_that_dies_is_said_to_be_away_and_found_again(server: ValkeyServer) -> None:
    valkey = _connected(server)
    try:
        take = valkey.script(_TAKE)
        assert await take([valkey.key("again")], [1]) == 1
        server.kill()
        with pytest.raises(UnavailableError, match="Valkey") as told:
            await take([valkey.key("again")], [1])
        assert PASSWORD not in str(told.value)
        server.start()
        assert await take([valkey.key("again")], [2]) == 2  # it kept nothing: a new server, and the script sent anew
    finally:
        await valkey.close()


async def test_a_wrong_password_is_said_without_showing_it(server: ValkeyServer, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(f"redis://:guess-of-mine@127.0.0.1:{server.port}/0")
    valkey = Valkey.configured(ValkeySettings(url_file=file))
    assert valkey is not None
    with pytest.raises(UnavailableError) as told:
        async with valkey.reached() as client:
            await client.ping()
    assert "guess-of-mine" not in str(told.value)
    await valkey.close()


@pytest.mark.parametrize(
    "url", ["", "localhost:6379", "http://localhost", "redis://", "redis://h:port/0", "redis://a b"]
)
def test_what_is_no_url_is_refused_without_showing_it(url: str, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(url)
    with pytest.raises(ConfigError, match=r"valkey\.url_file") as told:
        Valkey.configured(ValkeySettings(url_file=file))
    assert len(url) < 10 or url not in str(told.value)


def test_without_a_file_there_is_none() -> None:
    assert Valkey.configured(ValkeySettings()) is None
