"""Holds the code that export, engines, the lab, servers and fleets share and no chat loads.

This package may import `edge` and nothing above it.
"""
