"""Turns a checkpoint into a bundle: reads the weights, quantizes them, writes plain ONNX.

`cli` has the options, `config` checks them, and `pipeline` runs the stages. `sources` opens models,
`quantize` makes integers, `graph` writes ONNX, and `bundle` puts the result in place. This package
may import `edge`, `edge_make`, `edge_lab` and, in `pipeline`, the rules of `engines`; no package
imports it.
"""
