"""What a client's pod runs: it keeps asking until its standard input ends, and tells of each answer in a JSON line."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator

from chorus.client import ClientEvent, MeshClient, StartedAt
from chorus.config import load_config
from tests.mesh.test_coordinator_lost_process import changes, check_whole, raw

STREAMS = 3


def tell(**what: object) -> None:
    """One line, with the time that all processes of a machine share."""
    sys.stdout.write(json.dumps(what | {"at": time.monotonic()}) + "\n")
    sys.stdout.flush()


async def ask(mesh: MeshClient, numbers: Iterator[int], enough: asyncio.Event) -> None:
    """One question after the other."""
    while not enough.is_set():
        text = f"question {next(numbers)}"
        events: list[ClientEvent] = []
        try:
            async with mesh.generate(raw(text)) as generation:
                async for event in generation:
                    events.append(event)
                    if isinstance(event, StartedAt):
                        tell(began=text, runner=event.origin.runner_id)
            await check_whole(text, events)
        except Exception as error:
            tell(failed=text, why=f"{type(error).__name__}: {error}")
        else:
            tell(whole=text, moved=[change.runner_id for change in changes(events)])


async def main() -> None:
    """Asks over a few streams at once."""
    enough = asyncio.Event()
    reading = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    reading.add_done_callback(lambda _: enough.set())
    numbers = itertools.count()
    async with MeshClient.from_config(load_config()) as mesh:
        await asyncio.gather(*(ask(mesh, numbers, enough) for _ in range(STREAMS)))


if __name__ == "__main__":
    asyncio.run(main())
