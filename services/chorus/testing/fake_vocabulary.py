"""The fake engine's vocabulary: one token a byte, and tokens that say where they stand in which answer.

Ids 0 to 255 are bytes, so any text can be tokenized and any character can be split over tokens. A position token's id
and text follow from the answer's tag (of prompt and choice) and the token's index alone, so a test sees at once whether
one was lost, doubled or taken from another stream.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from chorus.core.generation import (
    Conversation,
    ImagePart,
    Prompt,
    TextPrompt,
    TokenPrompt,
    ToolCall,
)

START = 256
END = 257
_FIRST = 1_000
_INDEXES = 100_000
_TAGS = 10_000
VOCABULARY_SIZE = _FIRST + _TAGS * _INDEXES


def position_token(tag: int, index: int) -> int:
    """The id of the token at `index` (below 100,000) of the answer with this tag (below 10,000)."""
    return _FIRST + tag * _INDEXES + index


def position_of(token_id: int) -> tuple[int, int]:
    """The (tag, index) of a position token."""
    return divmod(token_id - _FIRST, _INDEXES)


def position_text(tag: int, index: int) -> str:
    """The text of a position token, such as `t0421.17 `."""
    return f"t{tag:04d}.{index} "


def piece_of(token_id: int) -> bytes:
    """The bytes of any token; the two special ones have none."""
    if token_id < 256:
        return bytes((token_id,))
    if token_id < _FIRST:
        return b""
    return position_text(*position_of(token_id)).encode()


def exists(token_id: int) -> bool:
    """Whether there is such a token."""
    return 0 <= token_id <= END or _FIRST <= token_id < VOCABULARY_SIZE


def answer_tag(prompt: bytes, choice: int) -> int:
    """The tag of the answer to a prompt."""
    return zlib.crc32(b"%d:%b" % (choice, prompt)) % _TAGS


def tokenize(text: str, *, add_special: bool) -> list[int]:
    """One token a byte of UTF-8."""
    return ([START] if add_special else []) + list(text.encode())


def detokenize(token_ids: Sequence[int], *, show_special: bool) -> str:
    """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
    special = {START: b"<start>", END: b"<end>"} if show_special else {}
    pieces = [special.get(token_id) or piece_of(token_id) for token_id in token_ids]
    return b"".join(pieces).decode("utf-8", "replace")


def prompt_tokens(prompt: Prompt) -> list[int]:
    """The tokens of a prompt; a conversation becomes lines such as `user: text`."""
    if isinstance(prompt, TokenPrompt):
        return list(prompt.token_ids)
    if isinstance(prompt, TextPrompt):
        return tokenize(prompt.text, add_special=True)
    return tokenize(_render(prompt), add_special=True)


def _render(conversation: Conversation) -> str:
    lines = []
    for message in conversation.messages:
        texts = []
        for part in message.parts:
            if isinstance(part, ToolCall):
                texts.append(f"{part.name}({part.arguments_json})")
            elif isinstance(part, ImagePart):
                texts.append(f"[{part.media_type}]")
            else:
                texts.append(part.text)
        lines.append(f"{message.role}: {''.join(texts)}")
    return "\n".join(lines)
