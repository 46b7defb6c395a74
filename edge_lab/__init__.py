"""Measures bundles, plans for devices, and diagnoses machines.

`measure` has quality, speed and drift; `planner` predicts memory and speed; `doctor` checks a
machine; `prove` does all of it in one run on a device; `cli` has the verbs. This package may import
`edge` and `edge_make`. Servers, fleets, the exporter and the engine builder stand on it.
"""
