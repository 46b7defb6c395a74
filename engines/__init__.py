"""Build TensorRT engines from exported bundles, and check the graphs and networks they come from.

Options and profiles of a build are here, and the graph edits that an engine needs. So are the rules
of each TensorRT version, our own kernels, and ``edge-llm build`` and ``check``. Running an engine
belongs in `edge.backends`, and writing a bundle in `export`. Only `compat` imports TensorRT, so
everything else works without it.
"""
