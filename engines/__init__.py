"""Build TensorRT engines from exported bundles, and check the graphs and networks they come from.

Options, plan and profiles of a build are in the root. From the lowest room to the highest, `rules`
says what each TensorRT takes, and `kernels` has our own kernels. `graph` makes the graph that is
parsed, `compiler` wraps TensorRT, `trtexec` makes its command lines. `builder` builds engines, and
`check` judges a bundle without one. Running an engine belongs in `edge.backends`, and writing a
bundle in `export`. Only `compiler.compat` imports TensorRT, so everything else works without it.
"""
