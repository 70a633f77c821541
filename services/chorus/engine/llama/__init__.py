"""llama.cpp in this process: many streams from one model, batched together at every step."""

from chorus.engine.llama.engine import LlamaEngine
from chorus.engine.llama.settings import AdapterSource, LlamaSettings, ModelSource, ResidencySettings, Tuned

__all__ = ["AdapterSource", "LlamaEngine", "LlamaSettings", "ModelSource", "ResidencySettings", "Tuned"]
