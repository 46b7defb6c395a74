"""Finds real models in PyPI packages."""
