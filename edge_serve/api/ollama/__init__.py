"""Ollama's API on the server's one way to answer."""
