"""Chorus: a handful of unequal machines answering as one private LLM service."""

__version__ = "0.1.0"
