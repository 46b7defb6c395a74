"""One run that proves a device: every step a verb of ``edge-llm`` in a process of its own."""
