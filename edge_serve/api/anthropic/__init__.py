"""Implements Anthropic's Messages API on top of `edge_serve.api.respond`."""
