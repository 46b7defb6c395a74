"""Predicts what a model will take and how fast it will be, before anything is exported.

Data flows one way. `devices` and `models` name what there is, and `edge.bundle.weights` counts
bytes by part. `memory` and `speed` turn them into figures, and `engine` reads those of a built
engine. `plan` makes a plan for every quantization, `picture` draws it, and `recommend` chooses.
`published` holds what others measured. Nothing here opens a model or needs a GPU.
"""
