"""The calls that a server is handling, by who makes them: those of a certificate, or a key, that ends are ended.

TLS looks at a certificate once, when a connection is made, and lets it go on for ever. Here whoever calls is looked at
for every call, and while it goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from chorus.core.errors import ChorusError, OverloadedError, UnauthenticatedError
from chorus.core.identity import SpiffeId
from chorus.transport.peer import Peer
from chorus.transport.standing import Standing

_LOOK_S = 0.5
"""How long after its caller's certificate or key a call may end."""
_RETRY_S = 1.0
_now = time.time


class OpenCalls:
    """Used from one event loop, that of the server. Listens to `standing` until closed."""

    def __init__(self, standing: Standing, *, most: int) -> None:
        """`most`: so many calls a caller may have open at once, over all its connections."""
        self.standing = standing
        self._most = most
        self._counts: Counter[SpiffeId] = Counter()
        self._tasks: dict[Peer, set[asyncio.Task[object]]] = {}
        self._ended: dict[asyncio.Task[object], ChorusError] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._forget = standing.on_change(self._look)

    @property
    def now(self) -> float:
        """The time, in seconds since 1970."""
        return _now()

    def began(self, peer: Peer) -> None:
        """The current task handles a call of `peer`, who was checked. Raises OverloadedError where it has too many."""
        task = asyncio.current_task()
        assert task is not None
        if self._counts[peer.spiffe_id] >= self._most:
            raise OverloadedError(
                f"{peer.spiffe_id} has {self._most} calls open here, which is as many as one caller may "
                "(mesh.max_calls_per_caller); end some first",
                retry_after_s=_RETRY_S,
            )
        self._counts[peer.spiffe_id] += 1
        self._tasks.setdefault(peer, set()).add(task)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look_again)

    def ended(self, peer: Peer) -> None:
        """The call of the current task has ended."""
        task = asyncio.current_task()
        assert task is not None
        tasks = self._tasks[peer]
        tasks.discard(task)
        self._counts[peer.spiffe_id] -= 1
        if not self._counts[peer.spiffe_id]:
            del self._counts[peer.spiffe_id]
        self._ended.pop(task, None)
        if not tasks:
            del self._tasks[peer]

    def why_ended(self) -> ChorusError | None:
        """Why the call of the current task, which is being cancelled, was ended by us; None where it was not.

        It is not being cancelled any more then.
        """
        task = asyncio.current_task()
        error = self._ended.pop(task, None) if task is not None else None
        if error is not None and task is not None:
            task.uncancel()
        return error

    def close(self) -> None:
        """Looks no more."""
        self._forget()
        if self._timer is not None:
            self._timer.cancel()

    def _look_again(self) -> None:
        self._timer = None
        self._look()
        if self._tasks:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look_again)

    def _look(self) -> None:
        """Ends the calls of those who may make them no longer."""
        now = self.now
        for peer, tasks in self._tasks.items():
            error = self._against(peer, now)
            for task in tasks if error is not None else ():
                if error is not None and task not in self._ended:
                    self._ended[task] = error
                    task.cancel()

    def _against(self, peer: Peer, now: float) -> ChorusError | None:
        if now >= peer.not_after:
            return self.standing.expired(peer)
        try:
            self.standing.check(peer)
        except UnauthenticatedError as error:
            return error
        return None
