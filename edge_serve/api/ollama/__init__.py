"""Implements Ollama's API on top of `edge_serve.api.respond`."""
