"""Anthropic's Messages API on the server's one way to answer."""
