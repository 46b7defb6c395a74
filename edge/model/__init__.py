"""Describes a model as a value: layers made of parts, and the names of their tensors.

What writes, weighs, calibrates, plans or checks a model is a loop over these parts.
"""
