"""What llama.cpp's answer to a batch means."""

from __future__ import annotations

from chorus.core.errors import EngineError

# From the comment on `llama_decode` in llama.h and what llama-context.cpp returns.
_MEANINGS = {
    1: "its KV memory has no room for it; fewer slots or a shorter context leave more",
    2: "it was broken off",
    -1: "it does not take this batch",
    -2: "memory for it could not be had; fewer slots, a shorter context or a smaller model need less",
    -3: "the computation failed; the log has llama.cpp's own words",
}


def batch_failed(code: int, tokens: int, *, what: str = "a batch") -> EngineError:
    """The error for a batch of `tokens` that llama.cpp answered with `code`, which is not 0.

    What it computed of the batch may be in the KV memory: whoever gets this removes the batch's sequences from it.
    """
    meaning = _MEANINGS.get(code, "it gave no known reason")
    return EngineError(
        f"llama.cpp could not compute {what} of {tokens} tokens: {meaning} (code {code})",
        metadata={"llama_code": str(code)},
    )
