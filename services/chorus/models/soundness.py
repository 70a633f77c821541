"""What llama.cpp asserts of a file: where that is wrong it ends the process, so it never gets to see the file.

The rest of what a damaged file can hold it reports as an error, or the reader of GGUF files finds.
"""

from __future__ import annotations

from pathlib import Path

from chorus.core.errors import ModelFileError
from chorus.models.gguf_reader import GgufHead, read_head

_MOST_LAYERS = 512
_MOST_EXPERTS = 1024
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")


def check_numbers(head: GgufHead, architecture: str) -> None:
    """Raises `ModelFileError`, which says the first wrong number, for a file that would end the process."""

    def number(key: str) -> int:
        return max((0, *head.integers(f"{architecture}.{key}")))

    layers, experts, used = number("block_count"), number("expert_count"), number("expert_used_count")
    groups, groups_used = number("expert_group_count"), number("expert_group_used_count")
    scaling = head.text(f"{architecture}.rope.scaling.type")
    wrong = {
        f"it claims {layers} layers": not 1 <= layers <= _MOST_LAYERS,
        f"it claims {number('nextn_predict_layers')} layers for later tokens": number("nextn_predict_layers") > layers,
        f"it claims {experts} experts, {used} of them used": not used <= experts <= _MOST_EXPERTS
        or (experts > 0 and not used),
        f"it claims {groups} groups of {experts} experts, {groups_used} of them used": groups > 0
        and (groups >= experts or (groups > 1 and (experts % groups > 0 or not 0 < groups_used < groups))),
        f"it scales positions by {scaling!r}": scaling is not None and scaling not in _ROPE_SCALINGS,
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise ModelFileError(f"{what[:120]}, so the file is damaged; download it again")


def check_vocabulary(path: Path) -> None:
    """Raises `ModelFileError` for a file whose tokens are not all unlike, which would end the process.

    Takes a tenth of a second for a large vocabulary, so it is not part of every look at a file.
    """
    read_head(path, vocabulary=True)
