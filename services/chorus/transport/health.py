"""`grpc.health.v1` for one process: whether it serves, as a whole ("") and by service name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from grpc_health.v1 import health_pb2

from chorus.core.errors import DrainingError, NotFoundError

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"]


class Health:
    """The states, and whoever watches them. Not serving at first. Used from one event loop."""

    def __init__(self, services: Iterable[str]) -> None:
        self._serving: dict[str, bool] = {"": False, **dict.fromkeys(services, False)}
        self._draining = False
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """Whether the process as a whole serves."""
        return self._serving[""]

    def set_serving(self, serving: bool, service: str | None = None) -> None:
        """Sets one service, or, without a name, all of them and the whole. Once draining, nothing serves again."""
        for name in self._serving if service is None else (service,):
            self._serving[name] = serving and not self._draining
        self._wake()

    def drain(self) -> None:
        """Tells everybody that nothing serves any more."""
        self._draining = True
        self.set_serving(False)

    def close(self) -> None:
        """Ends every watch, so that a server with watchers can stop."""
        self._closed = True
        self._wake()

    def state(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        """Returns the state of a service; SERVICE_UNKNOWN where there is none of that name."""
        serving = self._serving.get(service)
        if serving is None:
            return _UNKNOWN
        return _SERVING if serving else _NOT_SERVING

    async def states(self, service: str) -> AsyncIterator[health_pb2.HealthCheckResponse.ServingStatus]:
        """Yields the state now, then every change. Raises DrainingError when the process stops."""
        last = None
        while not self._closed:
            changed = self._changed
            state = self.state(service)
            if state != last:
                last = state
                yield state
                continue  # it may have changed while the watcher was told
            await changed.wait()
        raise DrainingError("this process is stopping")

    def known(self) -> dict[str, health_pb2.HealthCheckResponse.ServingStatus]:
        """Returns the state of every service."""
        return {name: self.state(name) for name in self._serving}

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class HealthServicer:
    """The states over gRPC."""

    def __init__(self, health: Health) -> None:
        self._health = health

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, _: Any
    ) -> health_pb2.HealthCheckResponse:
        """Answers with the state; NOT_FOUND for a service that isn't here."""
        state = self._health.state(request.service)
        if state == _UNKNOWN:
            here = ", ".join(sorted(filter(None, self._health.known())))
            raise NotFoundError(f"there is no service {request.service[:200]!r} here, only {here}")
        return health_pb2.HealthCheckResponse(status=state)

    async def List(  # noqa: N802
        self, _: health_pb2.HealthListRequest, __: Any
    ) -> health_pb2.HealthListResponse:
        """Answers with every service's state."""
        known = self._health.known().items()
        return health_pb2.HealthListResponse(
            statuses={name: health_pb2.HealthCheckResponse(status=state) for name, state in known}
        )

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, _: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Streams the state and its changes until the process stops."""
        async for state in self._health.states(request.service):
            yield health_pb2.HealthCheckResponse(status=state)
