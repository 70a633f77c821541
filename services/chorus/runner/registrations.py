"""A lease at every registry: one keeper for each address that the configured names have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from chorus.config import Endpoint
from chorus.runner.lease_keeper import LeaseKeeper
from chorus.runner.presence import Presence
from chorus.telemetry.logs import get_logger
from chorus.transport import TlsIdentity
from chorus.transport.resolve import resolve

_RESOLVE_INTERVAL_S = 5.0

_log = get_logger()


class Registrations:
    """The leases of one runner. Made and used on one event loop."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        presence: Presence,
        *,
        identity: TlsIdentity | None,
        insecure_loopback: bool,
        jitter: Callable[[], float],
    ) -> None:
        self._endpoints = tuple(endpoints)
        self._presence = presence
        self._identity = identity
        self._insecure_loopback = insecure_loopback
        self._jitter = jitter
        self._addresses: dict[Endpoint, frozenset[Endpoint]] = {}  # of each configured name
        self._unresolved: set[Endpoint] = set()
        self._keepers: dict[Endpoint, tuple[LeaseKeeper, asyncio.Task[None]]] = {}

    async def run(self) -> None:
        """Keeps the leases until cancelled. Raises StaleIncarnationError where a newer process of this runner lives."""
        names = any(endpoint.ip is None for endpoint in self._endpoints)
        while True:
            await asyncio.gather(*map(self._keep_up, self._endpoints))
            tasks = [task for _, task in self._keepers.values()]
            timeout_s = _RESOLVE_INTERVAL_S if names else None
            if tasks:
                done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            else:
                await asyncio.sleep(_RESOLVE_INTERVAL_S)

    async def close(self, *, goodbye: bool) -> None:
        """Ends every keeper; with `goodbye` the leases are given back."""
        await asyncio.gather(*(self._end(address, goodbye=goodbye) for address in list(self._keepers)))

    async def _keep_up(self, endpoint: Endpoint) -> None:
        """Follows the addresses of one name; a name that takes long to look up holds no other up."""
        await self._look_up(endpoint)
        await self._follow()

    async def _look_up(self, endpoint: Endpoint) -> None:
        """Finds the addresses of a name. Where that fails, those that it had stay."""
        try:
            self._addresses[endpoint] = await resolve(endpoint)
            self._unresolved.discard(endpoint)
        except OSError as error:
            if endpoint not in self._unresolved:
                _log.warning("registry.unresolved", registry=str(endpoint), why=error.strerror or str(error))
            self._unresolved.add(endpoint)

    async def _follow(self) -> None:
        """Begins with new addresses, and leaves those that no name has any more once they don't answer either."""
        wanted = {address for addresses in self._addresses.values() for address in addresses}
        for address in wanted - self._keepers.keys():
            keeper = LeaseKeeper(
                address,
                self._presence,
                identity=self._identity,
                insecure_loopback=self._insecure_loopback,
                jitter=self._jitter,
            )
            self._keepers[address] = (keeper, asyncio.create_task(keeper.run(), name=f"lease at {address}"))
        lost = [address for address in self._keepers.keys() - wanted if not self._keepers[address][0].registered]
        for address in lost:
            if address in self._keepers:  # another name's look-up may have ended it meanwhile
                await self._end(address, goodbye=False)

    async def _end(self, address: Endpoint, *, goodbye: bool) -> None:
        keeper, task = self._keepers.pop(address)
        task.cancel()
        await asyncio.wait({task})
        await keeper.close(goodbye=goodbye)
