"""Runs ``edge-llm`` as ``python -m edge.cli``."""

from . import main

main()
