"""Engines behind HTTP: Ollama, and servers compatible with OpenAI's API, such as vLLM and llama-server."""

from chorus.engine.remote.engine import RemoteEngine
from chorus.engine.remote.settings import RemoteSettings, read_api_key

__all__ = ["RemoteEngine", "RemoteSettings", "read_api_key"]
