"""Where model files come from: the hub, URLs, paths, an Ollama store, Python packages."""
