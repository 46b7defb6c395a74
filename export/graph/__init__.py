"""Builds the ONNX graphs and writes the data files that hold their weights.

`decoder`, `head` and `encoder` build one graph each on `graph_builder`; `linear_nodes` and the
modules beside it write the nodes that they share. Weights come in as `data_file.StoredTensor`, so
nothing here reads a checkpoint or chooses an integer.
"""
