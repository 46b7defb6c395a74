"""Adapters at run time: several LoRAs over one model, chosen per sequence.

A bundle that was exported with ``--adapters`` takes them; no other bundle loads this room.
"""
