"""Experiments; python3 -m lab lists them."""
