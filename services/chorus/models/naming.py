"""Names of families and files: how one is read from the other, and which are safe as names in a folder."""

from __future__ import annotations

import re

from chorus.core.errors import InvalidRequestError

GGUF_SUFFIX = ".gguf"
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
_QUANTIZATION = re.compile(
    r"[-._](?:UD-)?((?:I?Q|TQ)\d[A-Za-z0-9_]*|BF16|FP?16|FP?32|MXFP4\w*|NVFP4\w*)$", re.IGNORECASE
)
_NOT_IN_FAMILY = re.compile(r"[^a-z0-9.]+|\.\.+")


def family_of_file(file_name: str) -> str:
    """The family that a file's name tells: `SmolLM2-135M-Instruct.Q4_1.gguf` is of `smollm2-135m-instruct`."""
    stem = _QUANTIZATION.sub("", stem_of(file_name))
    return _NOT_IN_FAMILY.sub("-", stem.lower()).strip("-.") or "model"


def quantization_of_file(file_name: str) -> str:
    """The quantization that a file's name tells, such as `Q4_K_M`; empty where it tells none."""
    match = _QUANTIZATION.search(stem_of(file_name))
    return match.group(1).upper() if match else ""


def requantized_file(file_name: str, source: str, target: str) -> str:
    """The name of what is made from a file: `M.Q4_1.gguf` requantized to Q8_0 is `M.from-Q4_1.Q8_0.gguf`.

    It says so, because it is not as good as the same quantization of the original.
    """
    return f"{_QUANTIZATION.sub('', stem_of(file_name))}.from-{source}.{target}{GGUF_SUFFIX}"


def stem_of(file_name: str) -> str:
    """The file's name without `.gguf`."""
    return file_name[: -len(GGUF_SUFFIX)] if file_name.lower().endswith(GGUF_SUFFIX) else file_name


def checked_file_name(file_name: str) -> str:
    """Returns `file_name` if it is safe inside a folder and ends in .gguf; raises InvalidRequestError otherwise."""
    if not _SAFE.fullmatch(file_name) or not file_name.lower().endswith(GGUF_SUFFIX) or ".." in file_name:
        raise InvalidRequestError(
            "file",
            f"{file_name[:100]!r} should be a plain file name of letters, digits, dots and dashes, ending in .gguf",
        )
    return file_name


def checked_family(family: str) -> str:
    """Returns `family` if it is safe as a folder's name; raises InvalidRequestError otherwise."""
    if not _SAFE.fullmatch(family) or ".." in family:
        raise InvalidRequestError(
            "family", f"{family[:100]!r} should be a plain name of letters, digits, dots and dashes"
        )
    return family
