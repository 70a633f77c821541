"""The life of a service's process: logging, signals, the metrics listener, and exit codes that scripts can use.

0: it was asked to stop and did. 1: it failed. 2: its configuration or its certificates are wrong, so that starting it
again cannot help. 70: its engine hangs or keeps failing, and a new process may do better. 130, 143: it was asked twice
(SIGINT, SIGTERM) and went at once.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

from prometheus_client import CollectorRegistry

from chorus.config import ListenAddress, LogSettings, MeshSettings
from chorus.core.errors import CertificateError, ChorusError, ConfigError
from chorus.core.identity import Role, SpiffeId
from chorus.telemetry.corelog import core_log_events
from chorus.telemetry.logs import configure_logging, get_logger
from chorus.telemetry.metrics_server import MetricsServer
from chorus.transport.tls import CERTIFICATE_FILE, TlsIdentity

EXIT_FAILED = 1
EXIT_MISCONFIGURED = 2
EXIT_BROKEN = 70  # EX_SOFTWARE of sysexits.h

_STOP_MARGIN_S = 15.0
"""A service that has not stopped so long after its grace hangs, and is left where it is."""

_log = get_logger()


class HostedService(ABC):
    """What `run_service` runs. Made, started and stopped on one event loop."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Where it serves, as `host:port`; known once started."""

    @property
    def side_addresses(self) -> Mapping[str, str]:
        """Its other listeners by kind (`health`, `admin`), where it has any."""
        return {}

    @abstractmethod
    async def start(self) -> None:
        """Serves. Raises a ChorusError where it cannot."""

    @abstractmethod
    async def stop(self, grace_s: float) -> None:
        """Takes nothing new, lets what runs finish within `grace_s` seconds, and ends. Safe after a failed start."""

    @property
    def leaves_threads(self) -> bool:
        """Whether, once it has failed, something of it goes on that cannot be ended: its process ends without it."""
        return False

    async def wait_failed(self) -> ChorusError:
        """Returns, while it runs, once it cannot go on. Unless overridden, it always can."""
        never: asyncio.Future[ChorusError] = asyncio.get_running_loop().create_future()
        return await never


Build: TypeAlias = Callable[[CollectorRegistry], HostedService | Awaitable[HostedService]]
"""Makes a service on the event loop; what it measures goes to the registry."""


def leaf_folder(mesh: MeshSettings, role: Role, name: str) -> Path:
    """Returns where the leaf of a process is: in the folder of its role and name under `mesh.certs_dir`, or in
    `certs_dir` itself where that holds a leaf, as a Secret of Kubernetes does."""
    own = (mesh.certs_dir / CERTIFICATE_FILE).exists()
    return mesh.certs_dir if own else mesh.certs_dir / f"{role}-{name}"


def load_identity(mesh: MeshSettings, role: Role, name: str) -> TlsIdentity | None:
    """Returns who the process is that serves as `name`, or None for a mesh without TLS on loopback.

    Raises CertificateError where there is no valid certificate, or it is of somebody else.
    """
    if mesh.insecure_loopback:
        return None
    directory = leaf_folder(mesh, role, name)
    identity = TlsIdentity.load(directory)
    expected = SpiffeId(mesh.trust_domain, role, name)
    if identity.spiffe_id != expected:
        raise CertificateError(
            f"the certificate in {directory} is that of {identity.spiffe_id}, "
            f"but this process is configured as {expected}"
        )
    return identity


def keep_what_there_is(*, new_objects: int | None = None) -> None:
    """Has the garbage collector leave alone all that was made so far; call it once everything is imported.

    Modules and classes stay for ever: without them a full collection, which stops every stream, takes a tenth.
    `new_objects`: it looks for more only after so many; None: as often as Python does by itself.
    """
    gc.collect()
    gc.freeze()
    if new_objects is not None:
        gc.set_threshold(new_objects, *gc.get_threshold()[1:])


def run_service(
    name: str,
    build: Build,
    *,
    log: LogSettings,
    metrics: CollectorRegistry,
    metrics_listen: ListenAddress | None = None,
    grace_s: float = 0.0,
) -> int:
    """Runs a service until SIGTERM, SIGINT or its failure, and returns the exit code of its process.

    Call it on the main thread, before there are others, and `prepare_core()` before grpc is imported. Whatever goes
    wrong is one line on standard error, and an event in the log where that is another place. Where the service leaves a
    thread that hangs, this does not return: the process ends here, with all that it had to say.
    """
    import uvloop  # commands that are no services need the rest of this module alone

    try:
        with configure_logging(service=name, **dict(log)), core_log_events():
            try:
                # What asyncio's own loop does in Python for each message is a sixth of a relayed token's cost.
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    return runner.run(_run(name, build, metrics, metrics_listen, grace_s))
            except ChorusError as error:
                if log.file is not None:
                    _log.error("service.failed", reason=error.reason, why=error.message)
                raise
            except Exception:
                _log.exception("service.failed", reason=ChorusError.reason)
                raise
    except _BrokenError as error:
        _tell(name, str(error), EXIT_BROKEN)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # Leaving in the usual way runs what C code left to be run at the end, beneath a thread that still uses it.
        os._exit(EXIT_BROKEN)
    except (ConfigError, CertificateError) as error:
        return _tell(name, error.message, EXIT_MISCONFIGURED)
    except ChorusError as error:
        return _tell(name, error.message, EXIT_FAILED)
    except Exception as error:  # a defect of ours; the log has its traceback
        return _tell(name, f"internal error: {type(error).__name__}: {error}", EXIT_FAILED)


class _BrokenError(BaseException):
    """Ends the event loop, and after it the process, whatever still runs. No error for anybody to handle."""


def _tell(name: str, message: str, code: int) -> int:
    print(f"chorus {name}: {' '.join(message.split())}", file=sys.stderr)
    return code


async def _run(
    name: str,
    build: Build,
    metrics: CollectorRegistry,
    metrics_listen: ListenAddress | None,
    grace_s: float,
) -> int:
    asyncio.get_running_loop().set_exception_handler(_log_unhandled)
    asked = _catch_signals()
    with ExitStack() as stack:
        metrics_address = _serve_metrics(name, metrics, metrics_listen, stack)
        service = await _start(build, metrics, asked)
        if service is not None:
            side = {f"{kind}_address": address for kind, address in service.side_addresses.items()}
            if metrics_address is not None:
                side["metrics_address"] = metrics_address
            _log.info("service.ready", address=service.address, pid=os.getpid(), **side)
            await _serve(service, asked, grace_s)
    _log.info("service.stopped")
    return 0


async def _start(build: Build, metrics: CollectorRegistry, asked: asyncio.Event) -> HostedService | None:
    """Makes and starts the service; returns None where the process is asked to stop before that is done."""
    made: list[HostedService] = []

    async def make_and_start() -> HostedService:
        built = build(metrics)
        service = built if isinstance(built, HostedService) else await built
        made.append(service)
        await service.start()
        return service

    starting = asyncio.ensure_future(make_and_start())
    waiting = asyncio.ensure_future(asked.wait())
    await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.wait({starting})
    if not starting.cancelled() and starting.exception() is None:
        return starting.result()
    for service in made:
        await _stop(service, 0.0)
    return None if starting.cancelled() else starting.result()


async def _serve(service: HostedService, asked: asyncio.Event, grace_s: float) -> None:
    failing = asyncio.ensure_future(service.wait_failed())
    waiting = asyncio.ensure_future(asked.wait())
    try:
        await asyncio.wait({failing, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        failing.cancel()
    failure = failing.result() if failing.done() and not failing.cancelled() else None
    if failure is None:
        _log.info("service.stopping", grace_s=grace_s)
    else:
        _log.error("service.failing", reason=failure.reason, why=failure.message)
    await _stop(service, grace_s)
    if failure is not None and service.leaves_threads:
        raise _BrokenError(failure.message)
    if failure is not None:
        raise failure


async def _stop(service: HostedService, grace_s: float) -> None:
    try:
        async with asyncio.timeout(grace_s + _STOP_MARGIN_S):
            await service.stop(grace_s)
    except TimeoutError:
        _log.error("service.stop_hangs", after_s=grace_s + _STOP_MARGIN_S)


def _catch_signals() -> asyncio.Event:
    """Returns what the first SIGTERM or SIGINT sets. A second one ends the process there and then."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def caught(number: int) -> None:
        if asked.is_set():
            os._exit(128 + number)
        _log.info("service.signal", signal=signal.Signals(number).name)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, caught, number)
    return asked


def _serve_metrics(
    name: str, registry: CollectorRegistry, listen: ListenAddress | None, stack: ExitStack
) -> str | None:
    """Serves /metrics until `stack` is left; returns the bound address, or None where none was asked for."""
    if listen is None:
        return None
    key = f"{name}.metrics_listen"
    server = stack.enter_context(MetricsServer(registry, host=listen.host, port=listen.port, key=key))
    return str(ListenAddress(listen.host, server.port))


def _log_unhandled(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    _log.error("service.unhandled", why=context.get("message", ""), exc_info=context.get("exception"))
