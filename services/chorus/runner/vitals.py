"""Looks at the machine twice a second: how busy it is, and whether it has slept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from chorus.core.fleet.records import ModelLoad
from chorus.hardware import Inventory
from chorus.runner.presence import Presence
from chorus.telemetry.logs import get_logger
from chorus.telemetry.metrics import GenerationMetrics, MachineMetrics

_INTERVAL_S = 0.5
SLEPT_S = 2.0
"""Who slept for longer than this has lost its leases and its streams, and comes back as a new incarnation."""

_log = get_logger()


def seconds_asleep() -> float:
    """Seconds that this machine was suspended since its start, or 0 where the system does not tell."""
    boot_clock = getattr(time, "CLOCK_BOOTTIME", None)
    return 0.0 if boot_clock is None else time.clock_gettime(boot_clock) - time.monotonic()


async def watch_vitals(
    presence: Presence,
    inventory: Inventory,
    *,
    load_report: Callable[[], tuple[ModelLoad, ...]],
    metrics: GenerationMetrics,
    machine: MachineMetrics,
    asleep: Callable[[], float] = seconds_asleep,
) -> None:
    """Keeps `presence` and the metrics up to date until cancelled; `asleep` only ever rises."""
    slept_before = asleep()
    while True:
        # A driver that hangs, as NVIDIA's sometimes does, must not stop the heartbeats.
        hardware = await asyncio.to_thread(inventory.sample_load)
        presence.set_hardware(hardware)
        machine.measured(
            cpu_utilization=hardware.cpu_utilization,
            memory_total_bytes=hardware.memory_total_bytes,
            memory_available_bytes=hardware.memory_available_bytes,
            gpus=hardware.gpus,
        )
        for load in load_report():
            metrics.model(load.model).load(load)
        await asyncio.sleep(_INTERVAL_S)
        slept = asleep()
        if slept - slept_before > SLEPT_S:
            incarnation = presence.reincarnate()
            _log.warning("runner.woke", asleep_s=round(slept - slept_before, 1), incarnation=incarnation)
        slept_before = slept
