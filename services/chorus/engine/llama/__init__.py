"""llama.cpp in this process: many streams from one model, batched together at every step."""

from chorus.engine.llama.engine import LlamaEngine
from chorus.engine.llama.settings import LlamaSettings, ModelSource, Tuned

__all__ = ["LlamaEngine", "LlamaSettings", "ModelSource", "Tuned"]
