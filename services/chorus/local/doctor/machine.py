"""Checks of the machine: what Chorus stands on, whether or not a mesh runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx

from chorus.config import ChorusConfig
from chorus.core.errors import ChorusError, UnknownModelError
from chorus.core.findings import Findings, fail, ok, warn
from chorus.core.fitting.suggest import describe_bytes
from chorus.hardware import GpuSupport, Inventory
from chorus.models.catalog import DEFAULT_MODEL, Catalog
from chorus.models.memory import candidate_of
from chorus.models.store import ModelStore

OLLAMA = "http://127.0.0.1:11434/api/version"
_OLLAMA_TIMEOUT_S = 1.0
_LLAMA_TIMEOUT_S = 60.0
_FEW_FILES = 1024
_LITTLE_DISK_BYTES = 2 << 30
# Nobody runs this before it was written; a clock that says so was never set.
_WRITTEN = datetime(2026, 1, 1, tzinfo=UTC)

# In a process of its own: a library built for another processor ends the process that loads it (SIGILL).
_ASK_LLAMA = """
import json
from chorus.engine.llama import binding
print(json.dumps([binding.version(), list(binding.backends()), binding.supports_gpu_offload()]))
"""


@dataclass(frozen=True, slots=True)
class LlamaBuild:
    """What the installed llama.cpp is; `problem` where it cannot be used."""

    version: str = ""
    backends: tuple[str, ...] = ()
    offloads: bool = False
    problem: str = ""


def check_clock(now: datetime) -> Findings:
    """A clock that was never set makes every certificate look as if it came from the future."""
    if now < _WRITTEN:
        yield fail(
            "clock", f"it says {now:%Y-%m-%d %H:%M} UTC, which is past", "set it, best by NTP: timedatectl set-ntp 1"
        )
    else:
        yield ok("clock", f"{now:%Y-%m-%d %H:%M} UTC")


def ask_llama() -> LlamaBuild:
    """Looks at the installed llama.cpp without risking this process."""
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and words
            [sys.executable, "-c", _ASK_LLAMA], capture_output=True, text=True, timeout=_LLAMA_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return LlamaBuild(problem="it does not load within a minute")
    if done.returncode == -signal.SIGILL:
        return LlamaBuild(problem="it was built for another processor: loading it kills the process (SIGILL)")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return LlamaBuild(problem=last.partition(": ")[2] or last)
    version, backends, offloads = json.loads(done.stdout.splitlines()[-1])
    return LlamaBuild(version, tuple(backends), offloads)


def check_llama(build: LlamaBuild, ollama_here: bool) -> Findings:
    """Whether this machine can run models in its own runner."""
    if not build.problem:
        yield ok("llama.cpp", f"{build.version}, computes with {', '.join(build.backends) or 'nothing that it names'}")
    elif ollama_here:
        yield warn("llama.cpp", build.problem, "a runner here can use the Ollama on this machine instead")
    else:
        yield fail(
            "llama.cpp", build.problem, "`make setup` builds it for this machine; one that coordinates needs none"
        )


def check_gpu(build: LlamaBuild) -> Findings:
    """Whether the graphics devices that are here can be used by the llama.cpp that is here."""
    fix = "build llama.cpp for it: CHORUS_LLAMA_BACKEND=cuda make setup (needs the CUDA toolkit), or =vulkan"
    with Inventory("doctor", gpu_support=GpuSupport(build.offloads, fix)) as inventory:
        gpus, problem = inventory.node().gpus, inventory.gpu_problem
    if problem:
        yield fail(
            "gpu", problem, "nvidia-smi should list the device; until then this machine computes on its processor"
        )
    for gpu in gpus:
        what = f"{gpu.name}, {describe_bytes(gpu.memory_total_bytes)}, driver {gpu.driver_version or 'unknown'}"
        if gpu.usable:
            yield ok("gpu", what)
        else:
            yield warn("gpu", f"{what}: this build of llama.cpp cannot use it", gpu.problem)
    if not gpus and not problem:
        yield ok("gpu", "no NVIDIA device; models run on the processor")


def check_memory(config: ChorusConfig) -> Findings:
    """Whether the models that a runner here would load fit the memory that is free."""
    with Inventory("doctor") as inventory:
        node = inventory.node()
    free, total = node.memory_available_bytes, node.memory_total_bytes
    room = f"{describe_bytes(free)} of {describe_bytes(total)} free"
    needed, unknown = 0, []
    try:
        catalog = Catalog.load([Path(text).expanduser() for text in config.runner.catalogs])
    except ChorusError as error:
        yield fail("memory", str(error), "runner.catalogs names the files of catalogs")
        return
    for name in config.runner.models if config.runner.models is not None else (DEFAULT_MODEL,):
        try:
            needed += candidate_of(*catalog.find(name)).memory.total_bytes
        except UnknownModelError:
            unknown.append(name)
    asked = f"the configured models need about {describe_bytes(needed)} in one runner"
    if needed > total:
        yield fail("memory", f"{room}; {asked}", "choose a smaller model: `chorus models suggest`")
    elif needed > free:
        yield warn("memory", f"{room}; {asked}", "close other programs, or choose a smaller model")
    elif unknown:
        yield ok("memory", f"{room}; what {', '.join(unknown)} needs is not in the catalog")
    else:
        yield ok("memory", f"{room}; {asked}")


def check_models(config: ChorusConfig) -> Findings:
    """Whether the models folder is sound and has what a runner here would load."""
    try:
        listing = ModelStore.open(config.runner.models_dir).scan()
    except ChorusError as error:
        yield fail("models", str(error), "runner.models_dir names another folder")
        return
    for broken in listing.broken:
        yield fail("models", f"{broken.place.name}: {broken.problem}", f"remove {broken.place}, then pull it again")
    names = [stored.artifact.name for stored in listing.artifacts]
    if names:
        yield ok("models", f"{', '.join(names)} in {config.runner.models_dir}")
    else:
        yield ok("models", f"none in {config.runner.models_dir} yet", "`chorus up` fetches the default one")


def check_disk(config: ChorusConfig, mesh_folder: Path) -> Findings:
    """Whether there is room for models and logs."""
    seen: set[int] = set()
    for what, folder in (("models", config.runner.models_dir), ("the mesh", mesh_folder)):
        existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
        if existing is None or existing.stat().st_dev in seen:
            continue
        seen.add(existing.stat().st_dev)
        free = shutil.disk_usage(existing).free
        message = f"{describe_bytes(free)} free for {what} ({existing})"
        if free < _LITTLE_DISK_BYTES:
            yield warn("disk", message, "a model of ordinary size needs 1 to 5 GiB")
        else:
            yield ok("disk", message)


def check_open_files() -> Findings:
    """Every connection is an open file."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        yield warn("open files", f"at most {soft} in a process", f"ulimit -n {min(max(hard, soft), 65536)}")
    else:
        yield ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft} in a process")


def find_ollama() -> str | None:
    """Returns the version of the Ollama on this machine, or None. Asks loopback alone, through no proxy."""
    with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
        answer = httpx.get(OLLAMA, timeout=_OLLAMA_TIMEOUT_S, trust_env=False)
        return str(answer.raise_for_status().json()["version"])
    return None


def check_ollama(version: str | None) -> Findings:
    """Whether there is another source of models on this machine."""
    if version is None:
        yield ok("ollama", "none on this machine (nothing answers on 127.0.0.1:11434)")
    else:
        yield ok(
            "ollama", f"{version} answers on 127.0.0.1:11434", "`chorus models pull ollama:NAME` takes its models over"
        )
