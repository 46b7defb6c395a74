"""Implements OpenAI's Responses API on top of `edge_serve.api.respond`."""
