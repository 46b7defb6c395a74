"""Builds engines: graph, compilation, comparison, audit, and the files they end in."""
