"""Why a model can't be loaded, in numbers, and what its owner can do about it."""

from __future__ import annotations

from dataclasses import dataclass

from chorus.core.errors import OutOfMemoryError


@dataclass(frozen=True, slots=True)
class Held:
    """A model that would have to stay in memory, and what it holds of the host's."""

    name: str
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Shortage:
    """A model that fits nowhere, even once everything that may be evicted is gone.

    Bytes of the host's memory: what it needs; what it could use then, which is what is free without the reserve, and
    within what all models together may take. `max_loaded` is set where the number of models is in the way.
    """

    model: str
    needed_bytes: int
    usable_bytes: int
    free_bytes: int
    reserve_bytes: int
    limit_bytes: int
    staying: tuple[Held, ...] = ()
    max_loaded: int = 0

    @property
    def error(self) -> OutOfMemoryError:
        """The error for those who asked for the model."""
        pinned = ", ".join(f"{held.name} ({_mebibytes(held.host_bytes)})" for held in self.staying)
        if self.max_loaded:
            return OutOfMemoryError(
                f"{self.model} can't be loaded: {self.max_loaded} models may be in memory (runner.max_loaded_models), "
                f"and those that are there are pinned: {pinned}; unpin one (runner.pinned), or allow more",
                metadata={"max_loaded_models": str(self.max_loaded)},
            )
        usable = max(self.usable_bytes, 0)
        said = f"{self.model} needs about {_mebibytes(self.needed_bytes)} of memory and can use {_mebibytes(usable)}: "
        help_ = ["choose a smaller quantization, a shorter context or fewer slots"]
        if self.free_bytes - self.reserve_bytes <= self.usable_bytes:
            said += (
                f"{_mebibytes(max(self.free_bytes, 0))} are free, of which {_mebibytes(self.reserve_bytes)} are kept "
                "for other programs (runner.memory_reserve_gib)"
            )
            if self.needed_bytes <= self.free_bytes:
                help_.append("lower that reserve")
            else:
                help_.append("close other programs")
        else:
            said += f"all models together may take {_mebibytes(self.limit_bytes)} (runner.memory_limit_gib)"
            help_.append("raise that limit")
        if pinned:
            said += f", and these are pinned (runner.pinned): {pinned}"
            help_.append("unpin a model")
        return OutOfMemoryError(
            f"{said}; {', '.join(help_[:-1])} or {help_[-1]}",
            metadata={
                "required_bytes": str(self.needed_bytes),
                "available_bytes": str(usable),
            },
        )


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
