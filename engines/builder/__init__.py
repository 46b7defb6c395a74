"""Builds engines.

`build` decides how. `variant` compiles one variant by TensorRT's Python API, `fallbacks` the first
that builds, `tune` the fastest; `by_trtexec` lets ``trtexec`` do it. `record` describes an engine,
and `store` puts it into its bundle.
"""
