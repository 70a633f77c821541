"""A load that is told of while it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from chorus.core.fleet.records import ModelStatus
from chorus.core.generation import Progress
from chorus.engine.base import Engine


async def load_and_tell(
    engine: Engine, model: str, context_length: int | None = None
) -> AsyncGenerator[Progress | ModelStatus, None]:
    """Loads a model; yields its progress, the latest where it comes faster than it is taken, and its status at last.

    Raises as `Engine.load`.
    """
    latest: Progress | None = None
    news = asyncio.Event()

    def tell(progress: Progress) -> None:
        nonlocal latest
        latest = progress
        news.set()

    loading = asyncio.ensure_future(engine.load(model, tell, context_length=context_length))
    loading.add_done_callback(lambda _: news.set())
    try:
        while not loading.done():
            await news.wait()
            news.clear()
            told, latest = latest, None
            if told is not None:
                yield told
        yield loading.result()
    finally:
        if not loading.done():
            loading.cancel()
            await asyncio.wait({loading})
