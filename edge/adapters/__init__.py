"""Runs several LoRA adapters over one model, chosen per sequence.

Here: reading adapters in peft's layout, the library beside a bundle, what is in memory, and the
slots that a backend binds. Only bundles exported with ``--adapters`` load this package. Training,
merging and HTTP are elsewhere: `export` merges, `edge_serve` has the endpoints.
"""
