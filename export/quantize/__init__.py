"""Weights to integers: packing, and the methods that choose scales."""
