"""One load of a model: what a request that was let in works with until its end."""

from __future__ import annotations

from dataclasses import dataclass

from chorus.engine.llama.adapters import AdapterShelf
from chorus.engine.llama.binding import Model
from chorus.engine.llama.prompt import PromptReader
from chorus.engine.llama.worker import Worker


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """Weights, template and tokenizer, the owner thread, and the adapters in memory.

    A request may use `context_length` tokens, and a text to embed `embedding_length`. Whoever has it keeps it, however
    often the model is unloaded and loaded meanwhile: then what is asked of it is answered with `DrainingError`, or with
    what the thread died of.
    """

    model: Model
    reader: PromptReader
    worker: Worker
    shelf: AdapterShelf
    end_tokens: frozenset[int]
    context_length: int
    embedding_length: int
