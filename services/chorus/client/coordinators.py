"""The coordinators that a client knows: calls are spread over them, and go to another one where one fails."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Container, Iterable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio

from chorus.client.channel import CoordinatorChannel
from chorus.config import Endpoint
from chorus.core.errors import (
    CancelledError,
    ChorusError,
    ConfigError,
    DeadlineExceededError,
    DrainingError,
    InternalError,
    UnavailableError,
)
from chorus.core.resilience.peers import Peers
from chorus.core.resilience.stream_silence import StreamPatience
from chorus.telemetry import context
from chorus.transport import TlsIdentity
from chorus.transport.bearer import Bearer
from chorus.transport.guarding import StreamGuard, is_being_cancelled
from chorus.wire.errors import from_rpc_error

COORDINATOR = "coordinator"
"""In an error's metadata: the coordinator that is itself the trouble. Whatever else it says is the mesh's answer."""
UNREACHED = "unreached"
"""The same for one with which there was no connection, so that it knows nothing of the call."""

Metadata = tuple[tuple[str, str], ...]

_CLOSED = "this client is closed"
# A coordinator that lives says so itself where a runner is stuck; only its own silence counts.
_PATIENCE = StreamPatience(stall_s=float("inf"))
# One that shows no sign of life is left so much later where there is no other.
_LAST_ONE_S = 7.5
# Where all of them are restarted one after the other, the last may go before the connection to the first is back.
_ALL_GONE_S, _LOOK_S = 5.0, 0.1


class Coordinators:
    """Calls to coordinators. `rng` chooses the one that is asked first."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        identity: TlsIdentity | Bearer | None,
        insecure_loopback: bool,
        timeout_s: float,
        rng: random.Random | None = None,
    ) -> None:
        if not endpoints:
            raise ConfigError("a client needs the address of a coordinator (client.coordinators)")
        rng = rng if rng is not None else random.Random()
        self._peers = Peers(len(endpoints), rng.randrange(len(endpoints)))
        self._coordinators = [
            CoordinatorChannel(
                place,
                endpoint.named("coordinator"),
                identity=identity,
                insecure_loopback=insecure_loopback,
                on_failed=lambda place: self._peers.failed(place, self.now),
                on_recovered=self._peers.recovered,
            )
            for place, endpoint in enumerate(endpoints)
        ]
        self._timeout_s = timeout_s
        self._has_answered = False
        self._closed = False

    @property
    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def choose(self, without: Container[int] = ()) -> CoordinatorChannel | None:
        """The one to ask next, at none of those places; None where nobody is left. Raises where all is closed."""
        if self._closed:
            raise UnavailableError(_CLOSED)
        place = self._peers.choose(without)
        return None if place is None else self._coordinators[place]

    async def wait(self, since: float) -> bool:
        """Waits a moment for one of them to be back; False where it has gone on since `since` for too long.

        Nobody is waited for where none has ever answered: then the address is wrong, or the mesh is not up.
        """
        if not self._has_answered or self.now - since > _ALL_GONE_S:
            return False
        await asyncio.sleep(_LOOK_S)
        return True

    # --- calls to whoever answers -----------------------------------------------------------------------------------

    async def single(self, name: str, request: Any) -> Any:
        """The answer of a unary RPC. Raises ChorusErrors, UnavailableError where no coordinator can be reached."""
        metadata = metadata_now()
        problems: dict[int, ChorusError] = {}
        nobody_since: float | None = None
        while True:
            while (coordinator := self.choose(problems)) is not None:
                try:
                    return await self.ask(coordinator, name, request, metadata=metadata, timeout_s=self._timeout_s)
                except ChorusError as error:
                    if not lost(error):
                        raise
                    problems[coordinator.place] = error
            if nobody_since is None:
                nobody_since = self.now
            if not await self.wait(nobody_since):
                raise nobody(problems.values())
            problems.clear()

    async def stream(self, name: str, request: Any) -> AsyncGenerator[Any]:
        """The messages of a streaming RPC without a deadline; the next one is asked only while nothing has come.

        Closing it ends the call. Raises as `single`.
        """
        metadata = metadata_now()
        problems: dict[int, ChorusError] = {}
        while (coordinator := self.choose(problems)) is not None:
            begun = False
            messages = self.messages(coordinator, name, request, timeout_s=None, metadata=metadata)
            try:
                async for message in messages:
                    begun = True
                    yield message
            except ChorusError as error:
                if begun or not lost(error):
                    raise
                problems[coordinator.place] = error
            else:
                return
            finally:
                await messages.aclose()
        raise nobody(problems.values())

    # --- calls to one of them ---------------------------------------------------------------------------------------

    async def messages(
        self,
        coordinator: CoordinatorChannel,
        name: str,
        request: Any,
        *,
        timeout_s: float | None,
        metadata: Metadata,
        given_s: float | None = None,
    ) -> AsyncGenerator[Any]:
        """The messages of one streaming call; closing it ends the call. `given_s` is what an error says of the time.

        Raises ChorusErrors; those of which the coordinator itself is the trouble are `lost`.
        """
        call = coordinator.method(name)(request, timeout=timeout_s, metadata=metadata)
        guard = self._guard(coordinator, call)
        self._peers.began(coordinator.place)
        try:
            with guard:
                async for message in call:
                    guard.watch.heard(self.now, tokens=False)
                    self._answered(coordinator)
                    yield message
                    guard.watch.listening(self.now)
        except (grpc.RpcError, asyncio.CancelledError) as error:
            raise self._failure(coordinator, guard, error, given_s or timeout_s) from error
        finally:
            self._peers.ended(coordinator.place)
            # Whatever ended it: an abandoned call would go on for nobody.
            call.cancel()

    async def ask(
        self, coordinator: CoordinatorChannel, name: str, request: Any, *, metadata: Metadata, timeout_s: float
    ) -> Any:
        """The answer of one unary call. Raises as `messages`."""
        call = coordinator.method(name)(request, timeout=timeout_s, metadata=metadata)
        guard = self._guard(coordinator, call)
        self._peers.began(coordinator.place)
        try:
            with guard:
                answer = await call
        except (grpc.RpcError, asyncio.CancelledError) as error:
            raise self._failure(coordinator, guard, error, timeout_s) from error
        finally:
            self._peers.ended(coordinator.place)
            call.cancel()
        self._answered(coordinator)
        return answer

    async def close(self) -> None:
        """Ends every call and closes every channel."""
        self._closed = True
        await asyncio.gather(*(coordinator.close() for coordinator in self._coordinators))

    def _answered(self, coordinator: CoordinatorChannel) -> None:
        self._has_answered = True
        self._peers.answered(coordinator.place)

    def _guard(self, coordinator: CoordinatorChannel, call: Any) -> StreamGuard:
        return StreamGuard(
            coordinator,
            call,
            patience=_PATIENCE,
            wait_s=_LAST_ONE_S,
            goes_elsewhere=lambda _alive: self._peers.others(coordinator.place),
            clock=lambda: self.now,
        )

    def _failure(
        self,
        coordinator: CoordinatorChannel,
        guard: StreamGuard,
        error: grpc.RpcError | asyncio.CancelledError,
        given_s: float | None,
    ) -> BaseException:
        """What to raise for it; notes where the coordinator is the trouble."""
        if isinstance(error, asyncio.CancelledError) and guard.left is None:
            # Where a call was cancelled because its channel was closed, its caller was not, and must not think so.
            return UnavailableError(_CLOSED) if self._closed and not is_being_cancelled() else error
        if isinstance(error, asyncio.CancelledError) and is_being_cancelled():
            return error
        failure = guard.left or _of_coordinator(error, coordinator, given_s)
        if guard.left is not None:
            failure.metadata = {**failure.metadata, COORDINATOR: str(coordinator.endpoint)}
        if lost(failure):
            coordinator.suspect()
        return failure


def lost(error: ChorusError) -> bool:
    """Whether the coordinator itself is the trouble, so that another one may do better."""
    return COORDINATOR in error.metadata


def nobody(problems: Iterable[ChorusError]) -> ChorusError:
    """The error where each coordinator was asked in vain."""
    problems = list(problems)
    if len(problems) == 1 and isinstance(problems[0], DrainingError):
        return problems[0]
    told = "; ".join(dict.fromkeys(problem.message for problem in problems))
    return UnavailableError(
        f"no coordinator answers: {told}. Is the mesh up? `chorus up` starts one on this machine, "
        "`chorus status` shows it"
    )


def metadata_now() -> Metadata:
    """The ids of the request that a call is part of, or of a new one."""
    with context.bound(context.current() or context.new_context()):
        return context.outgoing_metadata()


def too_late(given_s: float, why: str = "", *, metadata: Mapping[str, str] | None = None) -> DeadlineExceededError:
    """The error where a request's time is over; `why` is what a coordinator says of it."""
    because = f" ({why})" if why else ""
    return DeadlineExceededError(
        f"it took longer than the {given_s:g} s that it was given{because}; client.timeout_s (a command's --timeout) "
        "gives it more",
        metadata=metadata,
    )


def _of_coordinator(error: Any, coordinator: CoordinatorChannel, given_s: float | None) -> ChorusError:
    """A call's error. Without ErrorInfo it is the transport's word, and the coordinator's fault or the network's."""
    failure = from_rpc_error(error, peer=coordinator.called)
    by_transport = "grpc_code" in failure.metadata
    if isinstance(failure, DeadlineExceededError) and given_s is not None:
        return too_late(given_s, "" if by_transport else failure.message, metadata=failure.metadata)
    if by_transport and isinstance(failure, CancelledError | InternalError):
        failure = UnavailableError(
            f"the call to {coordinator.called} was broken off ({failure.message})", metadata=failure.metadata
        )
    if (by_transport and isinstance(failure, UnavailableError)) or (
        isinstance(failure, DrainingError) and "runner_id" not in failure.metadata
    ):
        facts = {COORDINATOR: str(coordinator.endpoint)}
        if "failed to connect" in (error.details() or ""):
            facts[UNREACHED] = "true"
        failure.metadata = {**failure.metadata, **facts}
    return failure
