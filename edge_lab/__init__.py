"""Measures, plans and diagnoses: what a bundle is worth, what it will take, what a machine lacks.

It stands on `edge`. Servers, fleets, the exporter and the engine builder stand on it.
"""
