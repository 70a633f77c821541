"""The runner's load for balancers that know nothing of Chorus: beside each answer, and as a stream on its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from chorus.core.errors import ChorusError
from chorus.core.fleet.rates import Rate
from chorus.core.generation import Finished
from chorus.core.identity import AccessTable, Role
from chorus.core.resilience.failures import blames_runner
from chorus.runner.presence import Presence
from chorus.transport import Service
from chorus.wire.orca import (
    METHOD,
    SERVICE,
    TRAILER,
    OrcaLoadReport,
    OrcaLoadReportRequest,
    decode_interval_s,
    encode_report,
)

ACCESS: AccessTable = {METHOD: frozenset({Role.COORDINATOR, Role.CLIENT, Role.ADMIN})}
"""Whoever may send a runner requests may know how busy it is. The proto is not ours, so it cannot say it."""

_INTERVAL_S = 1.0
_SHORTEST_INTERVAL_S = 0.1  # the machine is looked at twice a second, the engine's load is that of this moment


class LoadReporter:
    """Says how busy a runner is, and counts what it answers. Used on one event loop; `clock` in seconds."""

    def __init__(self, presence: Presence, clock: Callable[[], float] = time.monotonic) -> None:
        self._presence = presence
        self._clock = clock
        self._requests = Rate()
        self._errors = Rate()

    @contextmanager
    def request(self, context: Any) -> Iterator[dict[str, float]]:
        """Counts a request and, if it ends well, sends a report with its answer; what it cost goes into the dict."""
        cost: dict[str, float] = {}
        try:
            yield cost
        except ChorusError as error:
            self._requests.note(self._clock())
            if blames_runner(error):
                self._errors.note(self._clock())
            raise
        # A caller who went away, which is no ChorusError, has no trailers any more.
        self._requests.note(self._clock())
        context.set_trailing_metadata(((TRAILER, self.report(cost).SerializeToString()),))

    def report(self, cost: dict[str, float] | None = None) -> Any:
        """An OrcaLoadReport as of now."""
        now, presence = self._clock(), self._presence
        return encode_report(
            presence.load(),
            memory_total_bytes=presence.node().memory_total_bytes,
            requests_per_s=self._requests.per_s(now),
            errors_per_s=self._errors.per_s(now),
            request_cost=cost,
        )


def generation_cost(finished: Finished) -> dict[str, float]:
    """What a generation took: tokens, and seconds in each part of it."""
    usage, timings = finished.usage, finished.timings
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "queue_seconds": timings.queue_s,
        "prefill_seconds": timings.prefill_s,
        "decode_seconds": timings.decode_s,
    }


def orca_service(reporter: LoadReporter) -> Service:
    """The service `xds.service.orca.v3.OpenRcaService`."""

    async def stream_core_metrics(request: Any, _: Any) -> AsyncIterator[Any]:
        """Reports at once, then as often as the caller wants, until he goes."""
        interval_s = max(decode_interval_s(request) or _INTERVAL_S, _SHORTEST_INTERVAL_S)
        while True:
            yield reporter.report()
            await asyncio.sleep(interval_s)

    def add(_: Any, server: grpc.aio.Server) -> None:
        handler = grpc.unary_stream_rpc_method_handler(
            stream_core_metrics,
            request_deserializer=OrcaLoadReportRequest.FromString,
            response_serializer=OrcaLoadReport.SerializeToString,
        )
        method = METHOD.rpartition("/")[2]
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, {method: handler}),))

    return Service(SERVICE, add, None)
