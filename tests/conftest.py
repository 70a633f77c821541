"""What holds for every test."""

from __future__ import annotations

import asyncio
import functools
import inspect
import signal
from collections.abc import Awaitable, Callable, Sequence

import pytest
import structlog
from hypothesis import HealthCheck, settings

# How long an example takes, or its making, says how busy the machine is, and nothing of what is tested.
settings.register_profile("chorus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("chorus")

# A shell starts background jobs with SIGINT ignored, and what is ignored stays so in every program that is started from
# there. Tests that interrupt a program as Ctrl-C would must find it listening, however they were started themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is logged is captured with a failed test's output: all of it, as structlog prints by itself.
structlog.configure()

# Longer than any test takes on a busy machine, and shorter than the time after which faulthandler ends the process.
LONGEST_S = 300.0


def bounded(test: Callable[..., Awaitable[None]], longest_s: float) -> Callable[..., Awaitable[None]]:
    """The same asynchronous test, which fails with TimeoutError where it hangs.

    A fixture can't do that: it is another task than the test, and has run to its end, or its `yield`, before.
    """

    @functools.wraps(test)
    async def run(*args: object, **kwargs: object) -> None:
        async with asyncio.timeout(longest_s):
            await test(*args, **kwargs)

    run.longest_s = longest_s  # type: ignore[attr-defined]
    return run


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Every asynchronous test is bounded."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = bounded(item.obj, LONGEST_S)
