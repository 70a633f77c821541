"""Which backend llama.cpp is built for on this machine: CUDA, Vulkan or the CPU alone, and why.

Looking is cheap (files and PATH, no process started), so that every `make` can look again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from console import SetupError

VARIABLE = "CHORUS_LLAMA_BACKEND"

# The parts of llama.cpp that Chorus doesn't use more than double the time of the build.
_UNUSED_OFF = ("-DLLAVA_BUILD=OFF", "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF")
_FLAGS = {"cpu": (), "cuda": ("-DGGML_CUDA=ON",), "vulkan": ("-DGGML_VULKAN=ON",)}

_NVIDIA_DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")
_NVCC_ELSEWHERE = ("/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc")
_LIBRARY_DIRECTORIES = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64")


@dataclass(frozen=True)
class Found:
    """What this machine has: paths, or None for what it lacks."""

    nvidia_driver: str | None
    nvcc: str | None
    gpu_device: str | None  # a DRM render node, which Vulkan drivers use
    vulkan_loader: str | None
    glslc: str | None  # Vulkan's shader compiler, needed to build


@dataclass(frozen=True)
class Backend:
    """What to build: `name` is cpu, cuda or vulkan; `why` is a clause for people."""

    name: str
    why: str
    nvcc: str | None = None

    @property
    def cmake_flags(self) -> tuple[str, ...]:
        return (*_UNUSED_OFF, *_FLAGS[self.name])


def look(environment: Mapping[str, str] = os.environ) -> Found:
    """Looks at this machine."""
    cuda_home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    nvcc_places = [f"{cuda_home}/bin/nvcc"] if cuda_home else []
    return Found(
        nvidia_driver=_first(_NVIDIA_DRIVER),
        nvcc=shutil.which("nvcc") or _first([*nvcc_places, *_NVCC_ELSEWHERE]),
        gpu_device=_first(str(path) for path in sorted(Path("/dev/dri").glob("renderD*"))),
        vulkan_loader=_first(
            str(path)
            for directory in _LIBRARY_DIRECTORIES
            for pattern in (
                "libvulkan.so",
                "*-linux-gnu/libvulkan.so",
            )  # without .1: building needs the development link
            for path in Path(directory).glob(pattern)
        ),
        glslc=shutil.which("glslc"),
    )


def pick(found: Found, asked: str | None = None) -> Backend:
    """Picks the backend; `asked` is `CHORUS_LLAMA_BACKEND` and wins over what was found.

    Raises SetupError if `asked` is no backend, or what it needs to be built isn't there.
    """
    if asked:
        return _asked(asked.strip().lower(), found)
    if found.nvidia_driver and found.nvcc:
        return Backend("cuda", f"an NVIDIA driver and {found.nvcc} are here", found.nvcc)
    if found.gpu_device and found.vulkan_loader and found.glslc:
        return Backend("vulkan", f"a GPU ({found.gpu_device}), Vulkan's loader and glslc are here")
    if found.nvidia_driver:
        return Backend("cpu", "there is an NVIDIA driver but no nvcc; install the CUDA toolkit to use the GPU")
    if found.nvcc:
        return Backend("cpu", f"{found.nvcc} is here, but no NVIDIA driver")
    if found.gpu_device:
        missing = " and ".join(
            name for name, path in (("libvulkan-dev", found.vulkan_loader), ("glslc", found.glslc)) if not path
        )
        return Backend(
            "cpu", f"there is a GPU ({found.gpu_device}) but no {missing}; install them to use it through Vulkan"
        )
    return Backend("cpu", "no GPU was found")


def _asked(name: str, found: Found) -> Backend:
    why = f"{VARIABLE}={name}"
    match name:
        case "cpu":
            return Backend("cpu", why)
        case "cuda":
            if not found.nvcc:
                raise SetupError(
                    f"{why}, but there is no nvcc", advice="Install the CUDA toolkit, or unset the variable."
                )
            return Backend("cuda", why, found.nvcc)
        case "vulkan":
            if not (found.vulkan_loader and found.glslc):
                raise SetupError(
                    f"{why}, but Vulkan's loader (libvulkan.so) or glslc is missing",
                    advice="On Debian and Ubuntu: sudo apt-get install libvulkan-dev glslc. Or unset the variable.",
                )
            return Backend("vulkan", why)
        case _:
            raise SetupError(f"{why} is no backend", advice=f"Set {VARIABLE} to cpu, cuda or vulkan, or unset it.")


def _first(paths: Iterable[str]) -> str | None:
    return next((path for path in paths if Path(path).exists()), None)
