"""Ending the calls that one makes.

grpc.aio cancels a call whose task is cancelled while it waits for that very call. One that is merely dropped (a `break`
out of its messages, an exception raised elsewhere) goes on for ever on the server, also after garbage collection: 3000
of 3000 streams did with grpcio 1.85.1 (grpc#43462). So every streaming call is made under one of these two.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from chorus.wire.errors import from_rpc_error

T = TypeVar("T")


@contextmanager
def cancelled_after(call: T) -> Iterator[T]:
    """Cancels `call` when the block is left; a call that has ended by then does not mind."""
    try:
        yield call
    finally:
        call.cancel()  # type: ignore[attr-defined]


async def responses(call: grpc.aio.UnaryStreamCall[Any, T], *, peer: str = "") -> AsyncIterator[T]:
    """Yields the messages of a streaming call, and cancels it when that stops for whatever reason.

    Raises ChorusError, naming `peer` where it could not be reached. Where every microsecond counts, use
    `cancelled_after`.
    """
    try:
        async for message in call:
            yield message
    except grpc.RpcError as error:
        raise from_rpc_error(error, peer=peer) from error
    finally:
        call.cancel()
