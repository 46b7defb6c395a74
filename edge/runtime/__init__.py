"""Turns prompts into answers over a backend: requests, slots, sampling, scheduling.

Here: `llm.LLM`, which opens a bundle and takes requests, the scheduler, sampling, structured
output, drafts, prefixes, and stopping and voting. It knows no engine by name (`edge.backends`
chooses) and no HTTP (`edge_serve`).
"""
