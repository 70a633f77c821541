"""Where one model goes: how many layers on which graphics devices, and what is left for the host.

llama.cpp offloads layers from the end: with n of them on graphics devices, these are the output and the last n - 1.
They are dealt out to the devices in order, in runs. A model goes whole to the smallest device that holds it; else whole
to as few devices as hold it, filled evenly; else as much of it as fits goes there, and the rest stays on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chorus.core.residency.devices import HOST, Device, Machine, Use
from chorus.core.residency.footprint import Footprint

ALL_THAT_FIT = -1
_SIXTEENTHS = 16


@dataclass(frozen=True, slots=True)
class Share:
    """A run of layers on one graphics device, and the bytes that they take there."""

    device: str
    layers: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """Where a model is. `shares` are in the order of the layers; `host_bytes` hold everything else."""

    host_bytes: int
    shares: tuple[Share, ...] = ()

    @property
    def gpu_layers(self) -> int:
        """Layers on graphics devices, the output counted as one."""
        return sum(share.layers for share in self.shares)

    def bytes_on(self, device: str) -> int:
        """What it takes of one memory."""
        if device == HOST:
            return self.host_bytes
        return sum(share.bytes for share in self.shares if share.device == device)


@dataclass(frozen=True, slots=True)
class Wish:
    """A model as somebody wants it loaded: for requests of `context_length` tokens, with which it takes `footprint`.

    At most `gpu_layers` of it go to graphics devices, or all that fit; only to `only_on`, where that is not None. One
    that is `pinned` is never evicted. `family` is its other name, by which a device may be dedicated to it.
    """

    name: str
    footprint: Footprint
    context_length: int = 0
    family: str = ""
    gpu_layers: int = ALL_THAT_FIT
    only_on: frozenset[str] | None = None
    pinned: bool = False

    def devices(self, machine: Machine) -> tuple[Device, ...]:
        """The graphics devices that it may go to. One that is dedicated to it takes it even if not assigned."""
        if self.gpu_layers == 0:
            return ()
        return tuple(
            gpu
            for gpu in machine.gpus
            if gpu.takes(self.name, self.family)
            and (self.only_on is None or gpu.name in self.only_on or gpu.use is Use.DEDICATED)
        )


def allocate(wish: Wish, machine: Machine, rooms: Mapping[str, int], *, whole: bool = False) -> Allocation | None:
    """Where the model goes with `rooms` bytes left on each device by name; None where it doesn't fit.

    With `whole`, only what has every layer that was wished for on graphics devices counts.
    """
    footprint = wish.footprint
    gpus = wish.devices(machine)
    most = len(footprint.offloadable) if wish.gpu_layers < 0 else min(wish.gpu_layers, len(footprint.offloadable))
    for chosen in _fewest_first(gpus, rooms) if most else ():
        found = _offload(footprint, machine, chosen, most, rooms)
        if found is not None:
            return found
    if whole and gpus:
        return None
    for layers in range(most - 1, 0, -1) if gpus else ():
        found = _offload(footprint, machine, gpus, layers, rooms)
        if found is not None:
            return found
    host_bytes = footprint.total_bytes
    return Allocation(host_bytes) if host_bytes <= rooms[HOST] else None


def _fewest_first(gpus: Sequence[Device], rooms: Mapping[str, int]) -> list[tuple[Device, ...]]:
    """Those dedicated to it and small ones alone before large ones, then more and more of the roomiest together."""
    alone = sorted(gpus, key=lambda gpu: (gpu.use is not Use.DEDICATED, rooms[gpu.name]))
    roomiest = sorted(gpus, key=lambda gpu: -rooms[gpu.name])
    together = [tuple(gpu for gpu in gpus if gpu in roomiest[:count]) for count in range(2, len(gpus) + 1)]
    return [*((gpu,) for gpu in alone), *together]


def _offload(
    footprint: Footprint, machine: Machine, gpus: Sequence[Device], layers: int, rooms: Mapping[str, int]
) -> Allocation | None:
    """The last `layers` over these devices, each filled about as far as the others."""
    sizes = footprint.offloadable[len(footprint.offloadable) - layers :]
    for part in range(1, _SIXTEENTHS + 1):
        shares = _deal(
            sizes, gpus, footprint.compute_bytes, {g.name: rooms[g.name] * part // _SIXTEENTHS for g in gpus}
        )
        if shares is not None:
            break
    else:
        return None
    shared = {gpu.name for gpu in machine.gpus if gpu.shares_host}
    host_bytes = footprint.on_host(layers)
    if host_bytes + sum(share.bytes for share in shares if share.device in shared) > rooms[HOST]:
        return None
    return Allocation(host_bytes, shares)


def _deal(
    sizes: Sequence[int], gpus: Sequence[Device], compute_bytes: int, rooms: Mapping[str, int]
) -> tuple[Share, ...] | None:
    """Fills one device after the other; None where layers are left over. A device that gets none is left out."""
    shares: list[Share] = []
    next_layer = 0
    for gpu in gpus:
        taken, layers = compute_bytes, 0
        while next_layer < len(sizes) and taken + sizes[next_layer] <= rooms[gpu.name]:
            taken += sizes[next_layer]
            next_layer += 1
            layers += 1
        if layers:
            shares.append(Share(gpu.name, layers, taken))
    return tuple(shares) if next_layer == len(sizes) else None
