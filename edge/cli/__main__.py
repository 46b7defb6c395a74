"""``python -m edge.cli``: the same as ``edge-llm``."""

from . import main

main()
