"""Implements the endpoints: from a request's body to prompts, and from tokens to its answer."""
