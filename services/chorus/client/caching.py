"""What the answer caches of a mesh hold, each coordinator's its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from chorus.api.coordinator.v1 import cache_pb2
from chorus.client.coordinators import Coordinators
from chorus.core.cache.policy import CacheMode
from chorus.core.errors import UnavailableError
from chorus.wire.cache import MODES
from chorus.wire.resources import decode_duration

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CacheHeld:
    """What one coordinator's cache holds of this caller (of everybody for an admin), and has done for everybody.

    `mode` is what requests get that say nothing; `semantic_problem` why there are no semantic hits, if there are none.
    """

    mode: CacheMode
    entries: int
    size_bytes: int
    max_entries: int
    max_bytes: int
    ttl_s: float
    exact_hits: int
    semantic_hits: int
    joined: int
    misses: int
    explored: int
    explored_wrong: int
    saved_tokens: int
    semantic_problem: str

    @classmethod
    def decode(cls, message: cache_pb2.GetCacheResponse) -> CacheHeld:
        """Out of its message."""
        modes = {value: mode for mode, value in MODES.items()}
        return cls(
            mode=modes.get(message.default_mode, CacheMode.OFF),
            entries=message.entry_count,
            size_bytes=message.size_bytes,
            max_entries=message.max_entries,
            max_bytes=message.max_bytes,
            ttl_s=decode_duration(message.ttl),
            exact_hits=message.exact_hit_count,
            semantic_hits=message.semantic_hit_count,
            joined=message.joined_count,
            misses=message.miss_count,
            explored=message.explored_count,
            explored_wrong=message.explored_wrong_count,
            saved_tokens=message.saved_token_count,
            semantic_problem=message.semantic_problem,
        )


@dataclass(frozen=True, slots=True)
class MeshCache:
    """The caches by coordinator, and why the others did not answer."""

    held: Mapping[str, CacheHeld]
    missing: Mapping[str, str]


async def cache_of(coordinators: Sequence[tuple[str, Coordinators]]) -> MeshCache:
    """Asks everybody at once. Raises UnavailableError where nobody answers."""

    async def ask(coordinator: Coordinators) -> CacheHeld:
        return CacheHeld.decode(await coordinator.single("GetCache", cache_pb2.GetCacheRequest()))

    held, missing = await of_each(coordinators, [ask(coordinator) for _, coordinator in coordinators])
    return MeshCache(held, missing)


async def clear_caches(coordinators: Sequence[tuple[str, Coordinators]], *, everybody: bool) -> Mapping[str, int]:
    """How many answers each coordinator forgot. Raises UnavailableError unless all of them did."""
    request = cache_pb2.ClearCacheRequest(everybody=everybody)

    async def ask(coordinator: Coordinators) -> int:
        answer: cache_pb2.ClearCacheResponse = await coordinator.single("ClearCache", request)
        return answer.forgotten_count

    forgotten, missing = await of_each(coordinators, [ask(coordinator) for _, coordinator in coordinators])
    if missing:
        raise UnavailableError(
            f"{', '.join(missing)} could not be asked, so answers are left there: {next(iter(missing.values()))}"
        )
    return forgotten


async def of_each(
    coordinators: Sequence[tuple[str, Coordinators]], asked: Sequence[Awaitable[T]]
) -> tuple[dict[str, T], dict[str, str]]:
    """The answers by coordinator, and why others gave none; raises the first where none did, and other errors."""
    found: dict[str, T] = {}
    missing: dict[str, UnavailableError] = {}
    answers = await asyncio.gather(*asked, return_exceptions=True)
    for (name, _), answer in zip(coordinators, answers, strict=True):
        if isinstance(answer, UnavailableError):
            missing[name] = answer
        elif isinstance(answer, BaseException):
            raise answer
        else:
            found[name] = answer
    if not found and missing:
        raise next(iter(missing.values()))
    return found, {name: error.message for name, error in missing.items()}
