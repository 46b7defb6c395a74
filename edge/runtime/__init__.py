"""Turns prompts into answers over a backend: requests, slots, sampling, scheduling.

Here: `llm.LLM`, which opens a bundle and takes requests, the scheduler, sampling, structured
output, drafts, prefixes, and stopping and voting. It imports no engine's library (`edge.backends`
does) and no HTTP (`edge_serve`).
"""
