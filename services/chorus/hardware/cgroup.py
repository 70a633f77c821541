"""The memory limit of this process's control group: what a container may use, which the machine's totals don't tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CGROUP_ROOT = Path("/sys/fs/cgroup")
SELF_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The tightest limit that applies, and how much of it is still free, in bytes."""

    limit_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class _Files:
    limit: str
    usage: str
    reclaimable: str  # the line of memory.stat that counts cache which goes first under pressure


_V2 = _Files("memory.max", "memory.current", "inactive_file")
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def memory_limit(*, root: Path = CGROUP_ROOT, self_cgroup: Path = SELF_CGROUP) -> MemoryLimit | None:
    """Returns the tightest memory limit of this process's group and those around it, or None where there is none.

    Never raises: a system without control groups, or with files that can't be read, has no limit.
    """
    try:
        lines = self_cgroup.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    tightest: MemoryLimit | None = None
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            base, files = root, _V2
        elif "memory" in controllers.split(","):
            base, files = root / "memory", _V1
        else:
            continue
        for directory in _self_and_above(base, path):
            found = _limit_of(directory, files)
            if found is not None and (tightest is None or found.free_bytes < tightest.free_bytes):
                tightest = found
    return tightest


def _self_and_above(base: Path, path: str) -> list[Path]:
    """The group's directory and those above it. In a container the path is the host's and only the root exists."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    return [base.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _limit_of(directory: Path, files: _Files) -> MemoryLimit | None:
    limit = _number(directory / files.limit)
    usage = _number(directory / files.usage)
    if limit is None or usage is None:
        return None
    reclaimable = _statistic(directory / "memory.stat", files.reclaimable)
    return MemoryLimit(limit, max(0, limit - max(0, usage - reclaimable)))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" is no number: no limit
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
