"""Makes integers of weights: packing, and the methods that choose scales.

`plan` says how each layer is converted and `linear` converts it in tiles. `rtn`, `gptq`, `awq` and
`smoothquant` round or prepare a layer; `calibration` and `calibrated` show them what a text does in
it; `from_source` keeps a checkpoint's own integers. Nothing here writes a graph or a bundle.
"""
