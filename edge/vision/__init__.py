"""Reads pictures in a prompt; only bundles with a vision encoder load this package.

Here: the manifest's section, decoding in confined children, the layout of tiles, the encoder on
each engine, and the rows that pictures take in a prompt. The export of encoders is in `export`, the
HTTP fields of pictures in `edge_serve`.
"""
