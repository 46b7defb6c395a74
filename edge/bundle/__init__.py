"""Reads and checks a bundle, the directory that an exporter writes, file by file.

Here: the manifest, hashes and signatures, names of bundles, the contract of the graph's inputs and
outputs, ``engine.json``, and small readers of ONNX. It loads no inference engine; writing bundles
is in `export`, building engines in `engines`.
"""
