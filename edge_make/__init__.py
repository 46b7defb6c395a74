"""Holds the code that export, engines, the lab, services and fleets share; a chat loads none of it.

This package may import `edge` and nothing above it.
"""
