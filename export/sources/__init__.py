"""Checkpoints as they are found: directories, hub, GGUF, adapters, vocabularies."""
