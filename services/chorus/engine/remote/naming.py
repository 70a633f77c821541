"""What a server's name for a model tells: its family, its quantization and about how many parameters it has."""

from __future__ import annotations

import re

from chorus.core.fleet.records import Tier

_QUANTIZATION = re.compile(
    r"[-._]?((?:I?Q|TQ)\d[A-Za-z0-9_]*|BF16|FP?16|FP?32|FP8|MXFP4\w*|NVFP4\w*|AWQ|GPTQ(?:-Int\d)?)$", re.IGNORECASE
)
_NOT_IN_FAMILY = re.compile(r"[^a-z0-9.]+|\.\.+")
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([KMBT])(?![A-Za-z0-9])", re.IGNORECASE)
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def family_of(name: str) -> str:
    """`Meta-Llama-3-8B` of `NousResearch/Meta-Llama-3-8B`; `qwen2.5-7b` of `qwen2.5:7b-q8_0`; all in lower case."""
    base, _, tag = short_name(name).partition(":")
    stem = base.removesuffix(".gguf")
    tag = "" if tag.lower() == "latest" else _QUANTIZATION.sub("", tag)
    stem = re.sub(r"-gguf$", "", _QUANTIZATION.sub("", stem), flags=re.IGNORECASE) or stem
    return _NOT_IN_FAMILY.sub("-", f"{stem}-{tag}".lower()).strip("-.") or "model"


def quantization_of(name: str) -> str:
    """Such as `Q4_K_M`; empty where the name tells none."""
    match = _QUANTIZATION.search(short_name(name).removesuffix(".gguf"))
    return match.group(1).upper() if match else ""


def parameters_of(text: str) -> int:
    """The number of parameters in `7.2B`, or in a name such as `Mixtral-8x7B-Instruct`; 0 where there is none."""
    match = _SIZE.search(text)
    if match is None:
        return 0
    experts, number, unit = match.groups()
    return int(int(experts or 1) * float(number) * _UNITS[unit.upper()])


def short_name(name: str) -> str:
    """The name without the folders, or the hub and owner, before it."""
    return name.rstrip("/").rpartition("/")[2] or name


def tier_of(parameter_count: int, *, external: bool) -> Tier:
    """The tier; where the size is not told, a paid API's models count as large and all others as small."""
    if parameter_count > 0:
        return Tier.of_parameters(parameter_count)
    return Tier.LARGE if external else Tier.SMALL
